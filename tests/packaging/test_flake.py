"""flake.nix, evaluated without a network or a daemon against a stub of nixpkgs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = {"x86_64-linux", "aarch64-linux"}

pytestmark = pytest.mark.skipif(
    shutil.which("nix-instantiate") is None, reason="needs nix-instantiate (Debian: nix-bin)"
)

# As little of nixpkgs as the flake touches: a package is its name, mkShell returns its argument,
# and so does what makes an application. Anything else that the flake asks for is an evaluation
# error here.
STUB = """
let
  flake = import FLAKE;
  packages = system: {
    python311 = "python311-${system}";
    gcc = "gcc";
    git = "git";
    gnumake = "gnumake";
    zlib = "/nix/store/zlib";
    stdenv.cc.cc.lib = "/nix/store/gcc-lib";
    lib.makeLibraryPath = list: builtins.concatStringsSep ":" (map (one: one + "/lib") list);
    uv = "uv";
    mkShell = arguments: arguments;
    writeShellApplication = arguments: arguments // { outPath = "/nix/store/${arguments.name}"; };
  };
  nixpkgs.legacyPackages = builtins.listToAttrs (
    map (name: { inherit name; value = packages name; }) [ "x86_64-linux" "aarch64-linux" ]
  );
  self = flake.outputs { inherit nixpkgs self; } // { outPath = "/nix/store/0123-source"; };
in
{
  inherit (self) apps devShells;
  packages = builtins.mapAttrs (_: all: {
    inherit (all.default) runtimeInputs text;
  }) self.packages;
}
"""


def nix(arguments, tmp_path):
    environment = dict(
        os.environ,
        HOME=str(tmp_path),
        NIX_STATE_DIR=str(tmp_path / "state"),
        NIX_LOG_DIR=str(tmp_path / "log"),
        NIX_CONF_DIR=str(tmp_path / "conf"),
    )
    done = subprocess.run(
        ["nix-instantiate", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def outputs(tmp_path):
    expression = STUB.replace("FLAKE", str(ROOT / "flake.nix"))
    arguments = ["--eval", "--strict", "--json", "--store", "dummy://", "--expr", expression]
    return json.loads(nix(arguments, tmp_path))


@pytest.fixture
def shells(outputs):
    return outputs["devShells"]


def test_the_flake_parses_and_asks_for_nixpkgs_alone(tmp_path):
    nix(["--parse", str(ROOT / "flake.nix")], tmp_path)
    expression = f"builtins.attrNames (import {ROOT / 'flake.nix'}).inputs"
    arguments = ["--eval", "--strict", "--json", "--store", "dummy://", "--expr", expression]
    assert json.loads(nix(arguments, tmp_path)) == ["nixpkgs"]


def test_each_system_has_both_shells_and_they_are_one(shells):
    assert set(shells) == SYSTEMS
    for system in SYSTEMS:
        assert set(shells[system]) == {"default", "dev-python"}
        assert shells[system]["default"] == shells[system]["dev-python"]


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_the_shell_has_what_set_up_needs(shells, system):
    packages = shells[system]["dev-python"]["packages"]
    assert set(packages) == {f"python311-{system}", "gcc", "git", "gnumake"}


@pytest.fixture
def project(tmp_path):
    """A folder whose make only records how it was called."""
    folder = tmp_path / "project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    command = folder / ".venv" / "bin" / "psyche-fast"
    command.write_text('#!/bin/sh\necho "ran $*"\n')
    command.chmod(0o755)
    (folder / "Makefile").write_text(
        "setup:\n\t@echo set up with $(PYTHON)\n\t@test ! -e broken\n.PHONY: setup\n"
    )
    return folder


def enter(shells, folder, command):
    """Does what `nix develop --command` does: the hook, then the command, in one bash."""
    hook = shells["x86_64-linux"]["dev-python"]["shellHook"]
    environment = dict(
        os.environ,
        PYTHONPATH="/leak",
        SOURCE_DATE_EPOCH="1",
        LD_LIBRARY_PATH="/mine",
        GIT_CEILING_DIRECTORIES=str(folder.parent),
    )
    return subprocess.run(
        ["bash", "-c", f"{hook}\n{command}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_hook_sets_up_and_puts_the_environment_s_commands_on_path(shells, project):
    done = enter(shells, project, "exec psyche-fast train --model x")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran train --model x\n"  # what set-up prints goes to standard error
    assert "set up with python3.11" in done.stderr


def test_the_hook_gives_wheels_their_libraries_and_drops_nix_s_python_settings(shells, project):
    command = 'echo "$LD_LIBRARY_PATH|${PYTHONPATH-none}|${SOURCE_DATE_EPOCH-none}"'
    libraries, python_path, epoch = enter(shells, project, command).stdout.strip().split("|")
    assert libraries.split(":")[:3] == ["/nix/store/gcc-lib/lib", "/nix/store/zlib/lib", "/mine"]
    assert (python_path, epoch) == ("none", "none")


def test_a_set_up_that_fails_ends_the_shell(shells, project):
    (project / "broken").touch()
    done = enter(shells, project, "echo went on")
    assert done.returncode != 0
    assert "went on" not in done.stdout


def test_each_system_has_a_package_and_the_app_that_runs_it(outputs):
    assert set(outputs["packages"]) == set(outputs["apps"]) == SYSTEMS
    for system in SYSTEMS:
        app = outputs["apps"][system]["default"]
        assert app == {"type": "app", "program": "/nix/store/psyche-fast/bin/psyche-fast"}
        assert f"python311-{system}" in outputs["packages"][system]["runtimeInputs"]


def test_the_package_runs_the_locked_versions_from_an_environment_of_the_user(outputs, tmp_path):
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\nprintf "%s|" "$UV_PROJECT_ENVIRONMENT" "${PYTHONPATH-none}" "$@"\n')
    uv.chmod(0o755)
    script = "set -euo pipefail\n" + outputs["packages"]["x86_64-linux"]["text"]
    done = subprocess.run(
        ["bash", "-c", script, "psyche-fast", "train", "--model", "my model"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "/leak"}
        | {"XDG_CACHE_HOME": "/cache"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )  # fmt: skip
    environment, path, *words = done.stdout.rstrip("|").split("|")
    assert (environment, path) == ("/cache/psyche_fast/nix-0123-source", "none")
    assert words[: words.index("psyche-fast")] == [
        "run", "--quiet", "--project", "/nix/store/0123-source", "--frozen", "--no-dev",
        "--no-editable", "--python", "python3.11",
    ]  # fmt: skip
    assert words[words.index("psyche-fast") :] == ["psyche-fast", "train", "--model", "my model"]
