"""The container file and the recipe for two regions, as far as that goes without their programs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from psyche_fast.cli import cli
from tests.doctor.support import program

ROOT = Path(__file__).resolve().parents[2]
REGIONS = ROOT / "examples" / "two_regions"


def instructions() -> list[tuple[str, str]]:
    """Of the container file, whole ones without comments."""
    lines = (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    whole = text.replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in whole if line]


def test_the_container_is_made_of_what_is_here() -> None:
    found = instructions()
    assert {name for name, _ in found} <= {
        "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR",
    }  # fmt: skip
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
        if name == "COPY" and "--from" not in rest:
            assert (ROOT / rest.split()[0]).exists()
    stages = [re.search(r" AS (\w+)$", rest) for name, rest in found if name == "FROM"]
    copied = re.findall(r"--from=(\w+)", str(found))
    assert set(copied) == {stage[1] for stage in stages if stage}
    # The Python of the constraints.
    assert "on Python 3.11" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(rest.split()[0].endswith("python:3.11-slim") for n, rest in found if n == "FROM")
    check(yaml.safe_load(dict(found)["ENTRYPOINT"]) + yaml.safe_load(dict(found)["CMD"]))


def check(words: list[str]) -> None:
    """Has the parser read a command, which runs nothing."""
    assert words[0] == "psyche-fast"
    cli.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("name", ["region.sh", "keys.sh", "region.sbatch"])
def test_a_script_is_valid(name: str) -> None:
    subprocess.run(["bash", "-n", REGIONS / name], check=True)


@pytest.mark.parametrize("region", ["east", "west"])
def test_sky_pilot_runs_the_region(region: str) -> None:
    task = yaml.safe_load((REGIONS / f"{region}.yaml").read_text(encoding="utf-8"))
    assert task["name"] == f"psyche-fast-{region}"
    assert {"resources", "workdir", "setup", "run", "envs"} <= task.keys()
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
    assert f"./region.sh {region} run" in task["run"]
    script = (REGIONS / "region.sh").read_text(encoding="utf-8")
    wanted = {"east": {"MODEL", "DATA"}, "west": set()}[region]
    assert wanted <= set(re.findall(r"\$\{(\w+):\?\}", script))
    assert wanted <= task["envs"].keys()


def run(folder: Path, *words: str) -> tuple[list[list[str]], subprocess.CompletedProcess[str]]:
    """Runs a script with programs that only say how they were called; the calls of psyche-fast."""
    programs, said = folder / "bin", folder / "said"
    program(programs, "psyche-fast", f'printf "%s\\n" psyche-fast "$@" "" >> {said}')
    program(programs, "ip", "exit 1")
    program(programs, "sudo", f'echo "$@" >> {folder}/root')
    done = subprocess.run(
        ["bash", *words],
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "MODEL": "my/model"}
        | {"DATA": "my/data", "GPUS": "4", "ARGUMENTS": "--resume auto", "OUTPUT": "out"}
        | {"SLURM_SUBMIT_DIR": str(REGIONS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )  # fmt: skip
    text = said.read_text() if said.exists() else ""
    return [call.splitlines() for call in text.rstrip("\n").split("\n\n")], done


@pytest.mark.parametrize("region", ["east", "west"])
def test_a_region_checks_its_machine_and_then_starts_its_ranks(tmp_path: Path, region: str) -> None:
    calls, done = run(tmp_path, str(REGIONS / "region.sh"), region, "run")
    assert done.returncode == 0, done.stderr
    for call in calls:
        check(call)
    assert [call[1] for call in calls] == ["doctor", "train" if region == "east" else "sidecar"]
    assert (tmp_path / "root").read_text() == f"wg-quick up {REGIONS}/{region}.conf\n"
    said = shlex.join(calls[1])
    if region == "east":
        assert "--data-parallelism 4 --local-ranks 4" in said
        assert said.endswith("--resume auto")
    else:
        assert "--world-size 8 --start-rank 4 --num-local-ranks 4" in said
    (tmp_path / "said").unlink()
    calls, _ = run(tmp_path, str(REGIONS / "region.sh"), region, "check")
    assert [call[1] for call in calls] == ["doctor"] + ["link"] * (region == "east")
    for call in calls:
        check(call)
    assert ("--link" in calls[0]) == (region == "west")


def test_slurm_runs_a_region_without_root(tmp_path: Path) -> None:
    calls, done = run(tmp_path, str(REGIONS / "region.sbatch"), "west")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in calls] == ["doctor", "sidecar"]
    assert not (tmp_path / "root").exists()
    _, done = run(tmp_path, str(REGIONS / "region.sbatch"), "north")
    assert done.returncode != 0


def test_keys_are_for_both_and_nobody_else(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    program(programs, "wg", 'case $1 in pubkey) sed s/^/public-of-/;; *) echo "$1-$PPID-$$";; esac')
    subprocess.run(
        ["bash", REGIONS / "keys.sh", "203.0.113.7", tmp_path],
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        check=True,
    )
    fields = {}
    for region in ("east", "west"):
        path = tmp_path / f"{region}.conf"
        assert path.stat().st_mode & 0o077 == 0
        fields[region] = dict(re.findall(r"^(\w+) = (.*)$", path.read_text(), re.MULTILINE))
    east, west = fields["east"], fields["west"]
    assert east["PublicKey"] == f"public-of-{west['PrivateKey']}"
    assert west["PublicKey"] == f"public-of-{east['PrivateKey']}"
    assert east["PresharedKey"] == west["PresharedKey"]
    assert west["Endpoint"] == "203.0.113.7:51820"
    assert west["AllowedIPs"].split("/")[0] == east["Address"].split("/")[0]
    assert len((tmp_path / "secret").read_text()) > 40
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
