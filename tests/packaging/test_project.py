"""What the package says about itself agrees with what is there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Modules whose distribution has another name.
DISTRIBUTIONS = {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel"}


def requirements():
    """All requirements by where they are declared."""
    project = PROJECT["project"]
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    groups["dev"] = PROJECT["dependency-groups"]["dev"]
    return {name: [Requirement(text) for text in texts] for name, texts in groups.items()}


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in parsed}


def imported_modules():
    """Top-level names that psyche_fast imports, each with a file that imports it."""
    found = {}
    for path in sorted((ROOT / "psyche_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], path.relative_to(ROOT))
    return found


def test_every_module_that_is_imported_is_a_declared_dependency():
    declared = {
        canonicalize_name(one.name)
        for group, listed in requirements().items()
        if group != "dev"
        for one in listed
    }
    undeclared = {
        module: str(path)
        for module, path in imported_modules().items()
        if module not in sys.stdlib_module_names
        and module not in ("psyche_fast", "_psyche_ext")  # the latter is part of Psyche's core
        and canonicalize_name(DISTRIBUTIONS.get(module, module)) not in declared
    }
    assert undeclared == {}


def test_every_requirement_has_a_tested_version_within_its_range():
    pinned = pins()
    for group in ("dependencies", "dev"):
        for one in requirements()[group]:
            pin = pinned.get(canonicalize_name(one.name))
            assert pin is not None, f"constraints.txt has no {one.name}"
            [exact] = pin.specifier
            assert exact.operator == "=="
            assert one.specifier.contains(exact.version), f"{pin} is outside {one}"


def test_uv_lock_is_of_these_requirements_and_has_the_tested_versions():
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    versions = {}
    for package in lock["package"]:
        versions.setdefault(package["name"], set()).add(package.get("version"))
    (own,) = [package for package in lock["package"] if package["name"] == "psyche-fast"]
    said = {
        (canonicalize_name(one["name"]), one.get("specifier", ""))
        for one in own["metadata"]["requires-dist"]
    }
    groups = requirements()
    dev = groups.pop("dev")
    own_ones = [one for group in groups.values() for one in group]
    renew = "uv.lock is of other requirements: make uv-lock"
    assert said == {(canonicalize_name(one.name), _specifier(one)) for one in own_ones}, renew
    older = {"fsspec"}  # an extra wants an older one, see .ci/uv_lock.py
    for one in [*groups["dependencies"], *dev]:
        name = canonicalize_name(one.name)
        [exact] = pins()[name].specifier
        assert exact.version in versions[name] or name in older, f"{name}: make uv-lock"
    assert all("registry" in p["source"] for p in lock["package"] if p is not own)
    urls = {p["source"]["registry"] for p in lock["package"] if p is not own}
    assert urls == {"https://pypi.org/simple"}


def _specifier(one):
    """As uv writes it: in the order of pyproject.toml, which packaging does not keep."""
    text = next(
        text
        for texts in (PROJECT["project"]["dependencies"],
                      *PROJECT["project"]["optional-dependencies"].values())
        for text in texts
        if Requirement(text).name == one.name
    )  # fmt: skip
    found = re.search(r"[<>=!~][^;]*", text)
    return found[0].strip() if found else ""


def test_constraints_hold_no_local_build():
    # "2.13.0+cpu" would keep a machine with a GPU from taking its build.
    assert [str(pin) for pin in pins().values() if "+" in str(pin)] == []


def test_triton_is_the_one_that_torch_s_cuda_build_asks_for():
    """torch 2.13.0's wheel on PyPI requires triton==3.7.1 on Linux; see constraints.txt."""
    versions = {name: str(pins()[name].specifier) for name in ("torch", "triton")}
    assert versions == {"torch": "==2.13.0", "triton": "==3.7.1"}
    asked = [
        Requirement(text)
        for text in metadata.requires("torch") or []
        if Requirement(text).name == "triton"
    ]
    for one in asked:  # none in a CPU build, and in another torch than the tested one its own
        if metadata.version("torch") == "2.13.0":
            assert str(one.specifier) == versions["triton"]


def test_lint_tools_are_pinned_in_one_version():
    pinned = pins()
    for one in requirements()["dev"]:
        if one.name in ("ruff", "mypy"):
            assert str(one.specifier) == str(pinned[one.name].specifier)


def test_the_version_is_in_one_place():
    import psyche_fast

    assert re.fullmatch(r"\d+\.\d+\.\d+", psyche_fast.__version__)
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "psyche_fast/__init__.py"


def test_the_licence_is_apache_2_without_a_foreign_copyright_line():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright [yyyy] [name of copyright owner]" in text  # the appendix, as published
    assert not re.search(r"Copyright (\(c\) )?\d{4}", text)


def test_importing_the_package_imports_no_torch():
    script = "import psyche_fast, sys; print({'torch', 'triton', 'transformers'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder that holds the Makefile and what its set-up depends on."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHON", "ARGS", "MAKEFLAGS", "MAKELEVEL")
        }
        return subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def fake_python(path, *, version):
    """Writes a python that claims a version and logs its calls beside itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = version < (3, 11)
    path.write_text(
        f"""#!/bin/sh
echo "$*" >> "{path.parent}/calls"
case "$1" in
  -c) exit {int(old)} ;;
  --version) echo "Python {version[0]}.{version[1]}.0" ;;
esac
if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
"""
    )
    path.chmod(0o755)
    return path


def test_make_refuses_a_python_that_is_too_old_in_one_line(make, tmp_path):
    old = fake_python(tmp_path / "bin" / "python3", version=(3, 10))
    done = make("setup", f"PYTHON={old}")
    assert done.returncode != 0
    first = done.stderr.splitlines()[0]
    assert first.startswith("psyche-fast needs Python 3.11 or newer; looked for: ")
    assert str(old) in first
    assert not (tmp_path / ".venv").exists()


def test_make_installs_torch_first_and_alone_then_the_rest_and_once_only(make, tmp_path):
    python = fake_python(tmp_path / "bin" / "python3", version=(3, 12))
    done = make("setup", f"PYTHON={python}")
    assert done.returncode == 0, done.stderr
    assert "making .venv with Python 3.12.0" in done.stdout
    # The copy in .venv logs beside the original, whose path it was written with.
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    installs = [call for call in calls if "pip install" in call]
    assert [call.split("install ")[1] for call in installs] == [
        "--quiet --upgrade pip>=25.1",
        "--constraint constraints.txt torch",
        "--quiet --constraint constraints.txt --group dev --editable .",
    ]
    assert make("--silent", "setup", f"PYTHON={python}").stdout == ""
    # Not by touching constraints.txt: within one tick of the file system's clock it is no newer.
    os.utime(tmp_path / ".venv" / "set-up", (1e9, 1e9))
    # A changed pin installs again, into the environment that is there.
    again = make("setup", f"PYTHON={python}")
    assert "making .venv" not in again.stdout
    assert "installing torch" in again.stdout
    after = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert len([call for call in after if "pip install" in call]) == 2 * len(installs)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", ".venv/bin/psyche-fast demo --max-steps 3"),
        ("test", ".venv/bin/python -m pytest -n 2 --max-steps 3"),
        ("lint", ".venv/bin/mypy"),
        ("bench", ".venv/bin/python -m pytest benchmarks "),
    ],
)
def test_each_target_sets_up_first_and_passes_arguments_on(make, target, command):
    lines = make("--dry-run", target, "ARGS=--max-steps 3").stdout.splitlines()
    setup = [number for number, line in enumerate(lines) if "--editable ." in line]
    job = [number for number, line in enumerate(lines) if line.startswith(command)]
    assert len(setup) == len(job) == 1
    assert setup < job
