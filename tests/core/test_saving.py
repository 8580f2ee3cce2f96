"""Checkpoints that cannot be written, are damaged, or are being written when the run is killed."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import types
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file

from psyche_fast import cli
from psyche_fast.config import RunConfig
from psyche_fast.core import export, resume
from psyche_fast.core.checkpoints import step_of
from psyche_fast.rank import saving, state
from tests.core.test_resume import go_on, parameters, same, without_later
from tests.core.test_run import COMMON, DISTRO, start, train
from tests.groups import Command, Finished, run_command
from tests.processes import wait_until

pytestmark = pytest.mark.processes

KILLS = int(os.environ.get("SAVE_KILLS", "3"))
"""How often a run is killed in a save; 200 by hand."""


def arguments(place: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--output", str(output), *COMMON, *more,
    ]  # fmt: skip


def small_files(given: list[str]) -> None:
    """`psyche-fast` where no file may be larger than is given first."""
    size, *given = given
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    cli.main(given)


def no_room_for_the_model(given: list[str]) -> None:
    """`psyche-fast` on a disk that is full when the first model is to be written."""
    write = export.write_tensors

    def full(folder: Path, tensors: Iterable[Any]) -> None:
        export.write_tensors = write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "shard-0"))

    export.write_tensors = full
    cli.main(given)


def folder_that_goes(given: list[str]) -> None:
    """`psyche-fast` whose run directory is removed when the first file of a state is written."""
    write = state.write_part
    output = Path(given[given.index("--output") + 1])

    def goes(*arguments: Any) -> state.StateFile:
        state.write_part = write
        written = write(*arguments)
        shutil.rmtree(output)
        return written

    state.write_part = goes
    cli.main(given)


def ended(program: str, *given: str) -> Finished:
    run = Command(*given, program=f"tests.core.test_saving:{program}")
    out, err = run.communicate()
    assert run.returncode is not None
    return Finished(run.returncode, out, err)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("no_room_for_the_model", "checkpoint of step 2 not written: [Errno 28] No space left"),
        ("folder_that_goes", "checkpoint of step 2 not written: rank 0"),
    ],
)
def test_training_goes_on_where_a_checkpoint_cannot_be_written(
    place: Path, tmp_path: Path, program: str, says: str
) -> None:
    run = tmp_path / "run"
    given = arguments(place, run, "--checkpoint-every", "2", "--total-steps", "4")
    result = ended(program, *given)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(says) == 1, result.stderr
    assert "going on" in result.stderr
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000004"]
    state.check_sums(*newest(run))


def test_a_full_disk_leaves_older_checkpoints_and_the_last_model(
    place: Path, tmp_path: Path
) -> None:
    """The state is larger than a file may be; of the model there is room."""
    run = tmp_path / "run"
    train(place, run, "--total-steps", "2", "--param-dtype", "bfloat16")
    model = (run / "checkpoints" / "step-000002" / "model.safetensors").stat().st_size
    given = arguments(
        place, run, "--checkpoint-every", "2", "--total-steps", "6", "--param-dtype", "bfloat16",
        "--resume", "auto", "--keep", "1",
    )  # fmt: skip
    result = ended("small_files", str(model + 2000), *given)
    assert result.returncode == 0, result.stderr
    assert "checkpoint of step 4 not written: rank 0: " in result.stderr
    assert "--resume will not know the checkpoint of step 6: rank 0: " in result.stderr
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000002", "step-000006"]
    transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000006")
    result = start(
        place, run, "--total-steps", "7", "--param-dtype", "bfloat16", "--resume", "auto",
        "--dry-run",
    )  # fmt: skip
    assert "step-000002, from step 3" in result.stderr


def test_no_right_to_write(place: Path, tmp_path: Path) -> None:
    """For root too: a file is where the folder would be."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("")
    result = start(place, run, "--checkpoint-every", "2", "--total-steps", "4")
    assert result.returncode == 1
    assert "checkpoint of step 2 not written: rank 0: " in result.stderr
    assert "checkpoints" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    given = [*DISTRO, "--replicas", "2", "--checkpoint-every", "2", "--total-steps", "4"]
    train(place, run, *given, "--param-dtype", "bfloat16", ranks=2)
    return run


def newest(run: Path) -> tuple[Path, state.Manifest]:
    folder = max((run / "checkpoints").glob("step-*"))
    return folder, state.read_manifest(folder)


def found(run: Path) -> resume.Start | None:
    return resume.find_start(RunConfig.of(output=str(run), resume="auto"))


def test_a_flipped_bit_is_named_wherever_it_is(finished: Path, tmp_path: Path) -> None:
    folder, _ = newest(finished)
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    assert {Path(name).stem.rstrip("0123456789") for name in names} >= {
        "config", "model", "manifest", "rank-", "parameters-",
    }  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in names:
        path = run / "checkpoints" / folder.name / name
        content = path.read_bytes()
        # A bit that leaves JSON what it is, and numbers what numbers can be.
        at = content.rindex(b"e") if path.suffix == ".json" else len(content) - 3
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        start = found(run)
        assert start is not None
        assert start.folder.name == "step-000002"
        (note,) = start.notes
        assert note.startswith(f"--resume: passed over {path}"), note
        with pytest.raises(ValueError, match=f"^{path}"):
            export.export(path.parents[1] if "/" in name else path.parent, tmp_path / "out", None)
        assert not (tmp_path / "out").exists()
        for cut in (content[:-1], None):
            path.unlink() if cut is None else path.write_bytes(cut)
            start = found(run)
            assert start is not None
            assert [str(path) in note for note in start.notes] == [True]
        path.write_bytes(content)
    start = found(run)
    assert start is not None
    assert (start.folder.name, start.notes) == (folder.name, ())


def test_versions_are_read_or_refused(place: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = newest(run)[0] / "state" / "manifest.json"
    given = ["--resume", "auto", "--param-dtype", "bfloat16"]
    manifest = json.loads(path.read_text())
    first = {k: v for k, v in manifest.items() if k not in ("tracker", "model", "sha256")}
    path.write_text(json.dumps({**first, "version": 1}))
    result = go_on(place, run, *given, "--dry-run")
    assert "step-000004, from step 5" in result.stderr
    path.write_text(json.dumps({**manifest, "version": 3, "more": "of a later version"}))
    result = go_on(place, run, *given, "--dry-run")
    assert f"passed over {path}: version 3, this program reads 1 to 2" in result.stderr
    assert "step-000002, from step 3" in result.stderr
    other = {**manifest["machine"], "torch": "2.11.0", "processor": "another", "more": "1"}
    assert "kernels" in other
    state.write_manifest(
        path.parent, msgspec.convert({**manifest, "machine": other}, state.Manifest)
    )
    result = go_on(place, run, *given, "--dry-run")
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning")]
    (line,) = [line for line in warned if "emulates" not in line]  # on CPUs without bfloat16
    assert "torch 2.11.0 -> " in line
    assert "processor another -> " in line
    assert line.endswith("the state is exact, what follows need not be")


def test_export_is_the_models_folder(finished: Path, tmp_path: Path) -> None:
    """Of any checkpoint; and the masters, if they are asked for."""
    folder, _ = newest(finished)
    result = run_command("export", str(folder), str(tmp_path / "out"))[0]
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}: the model of step 4\n"
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert same(made, parameters(finished, 4))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    wide = tmp_path / "wide"
    assert run_command("export", str(folder), str(wide), "--save-dtype", "float32")[0].stdout
    masters = load_file(folder / "state" / "parameters-00000.safetensors")
    for name, tensor in load_file(wide / "model.safetensors").items():
        assert torch.equal(tensor, masters[f"master/{name}"]), name
        assert torch.equal(tensor.bfloat16(), made[name])
    assert transformers.AutoModelForCausalLM.from_pretrained(wide).dtype == torch.float32
    again = run_command("export", str(folder), str(wide))[0]
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "is there already" in again.stderr
    nothing = run_command("export", str(finished), str(tmp_path / "none"))[0]
    assert nothing.returncode == 2
    assert "state/manifest.json" in nothing.stderr


def test_what_falls_due_meanwhile_is_left_out_and_said(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = arguments(place, run, "--checkpoint-every", "1", "--total-steps", "4")
    result = ended("slow_disk", *given)
    assert result.returncode == 0, result.stderr
    for step in (2, 3):
        assert f"no checkpoint of step {step}: that of step 1 is being written" in result.stderr
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000001", "step-000004"]
    part = without_later(run, tmp_path / "part", 1)
    train(place, part, "--checkpoint-every", "0", "--total-steps", "4", "--resume", "auto")
    assert same(parameters(part, 4), parameters(run, 4))


def slow_disk(given: list[str]) -> None:
    """`psyche-fast` that takes a second to write a file."""
    write = state.write_part

    def slow(*arguments: Any) -> state.StateFile:
        time.sleep(1)
        return write(*arguments)

    saving.state.write_part = slow
    cli.main(given)


def tracked(given: list[str]) -> None:
    """`psyche-fast` with a tracker that writes down how it is started."""
    log, *given = given

    class Run:
        id = "a1b2"

        def log(self, metrics: dict[str, float], step: int) -> None:
            """Shows nothing."""

        def finish(self) -> None:
            """Likewise."""

    def init(**arguments: Any) -> Run:
        with Path(log).open("a") as file:
            file.write(json.dumps([arguments.get("id"), arguments.get("resume")]) + "\n")
        return Run()

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace(name="wandb")  # type: ignore[assignment]
    wandb.init = init  # type: ignore[attr-defined]
    sys.modules["wandb"] = wandb
    cli.main(given)


def test_a_tracker_goes_on_with_its_run(place: Path, tmp_path: Path) -> None:
    log, run = str(tmp_path / "log"), tmp_path / "run"
    given = ["--tracker", "wandb", "--resume", "auto", "--total-steps"]
    for steps in ("1", "2"):
        result = ended("tracked", log, *arguments(place, run, *given, steps))
        assert result.returncode == 0, result.stderr
    fork = [*given[:2], "--fork", str(run), "--total-steps", "3"]
    assert ended("tracked", log, *arguments(place, tmp_path / "fork", *fork)).returncode == 0
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    assert lines == [[None, None], ["a1b2", "allow"], [None, None]]


def test_killed_while_it_saves(place: Path, tmp_path: Path) -> None:
    """Every checkpoint that has its name is whole, and the run goes on from the newest one."""
    run, step = tmp_path / "run", 0
    seed = int(os.environ.get("SAVE_SEED", str(random.randrange(1 << 30))))
    chance = random.Random(seed)
    print(f"SAVE_SEED={seed}")  # which a failure shows
    given = arguments(
        place, run, *DISTRO, "--replicas", "2", "--checkpoint-every", "3", "--keep", "3",
        "--total-steps", "1000000", "--resume", "auto",
    )  # fmt: skip
    folder = run / "checkpoints"
    for number in range(KILLS):
        core = Command(*given)
        # The one that was killed before goes first.
        wait_until(lambda: not any(folder.glob(".state-*")), 200)
        wait_until(lambda: any(folder.glob(".state-*")), 200)
        for _ in range(chance.randrange(4)):  # the first one, or a later one
            with suppress(AssertionError):
                wait_until(lambda: not any(folder.glob(".state-*")), 2)
                wait_until(lambda: any(folder.glob(".state-*")), 2)
        time.sleep(chance.uniform(0, 0.08))
        core.send_signal(signal.SIGKILL)
        core.communicate()
        assert f"from step {step + 1}" in core.stderr() or not step, core.stderr()
        steps = []
        for path in (p for p in folder.iterdir() if step_of(p)):
            manifest = state.read_manifest(path)
            state.check_sums(path, manifest)
            assert len(manifest.files) == 3
            steps.append(manifest.step)
        newest_one = found(run)
        assert (newest_one is None) == (not steps), number
        if newest_one is not None:
            assert newest_one.manifest.step == max(steps) >= step
            assert newest_one.notes == ()
            step = max(steps)
    print(f"{KILLS} kills, step {step}")
