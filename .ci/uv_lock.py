"""Writes uv.lock: the versions of constraints.txt where the extras can have them too.

    .venv/bin/python .ci/uv_lock.py        (make uv-lock; wants uv, and PyPI)

constraints.txt has what the tests run with, without extras. uv locks all of it at once, extras
among it, for each Python: of what pyproject.toml names itself it takes the versions of
constraints.txt, the rest it finds.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OLDER = {"fsspec"}
"""Of which an extra (s3fs) wants an older one than the tests run with."""


def wanted() -> list[str]:
    """The pins of what pyproject.toml names, as requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {canonicalize_name(Requirement(text).name) for text in named} - OLDER
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [str(pin) for pin in pins if canonicalize_name(pin.name) in names]


def main() -> None:
    """Locks anew from scratch: what is no longer wanted goes."""
    lock = ROOT / "uv.lock"
    lock.unlink(missing_ok=True)
    pins = [word for pin in wanted() for word in ("--upgrade-package", pin)]
    sys.exit(subprocess.run(["uv", "lock", *pins], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
