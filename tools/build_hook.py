"""Hatch calls this for wheels and source archives: it puts in the commit that they are of."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """Writes `commit.txt`, where there is a repository to ask, for `psyche_fast/version.py`."""

    PLUGIN_NAME = "custom"
    _written: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the file to what is built, unless that leads back to this folder."""
        if version == "editable" or not Path(self.root, ".git").exists():
            return  # what is unpacked from a source archive has the file
        sys.path.insert(0, self.root)
        from psyche_fast.version import commit

        if (known := commit()) is None:
            return
        descriptor, self._written = tempfile.mkstemp(text=True)
        with os.fdopen(descriptor, "w") as file:
            file.write(known + "\n")
        build_data["force_include"][self._written] = "psyche_fast/commit.txt"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Takes away what was only there to be packed."""
        if self._written is not None:
            os.unlink(self._written)
