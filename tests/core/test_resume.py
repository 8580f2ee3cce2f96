"""A run that goes on from a checkpoint is, to the bit, the run that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psyche_fast.config import FLAGS, RunConfig
from psyche_fast.core import run as core
from psyche_fast.core.plan import make_plan
from psyche_fast.core.resume import _FREE
from psyche_fast.metrics import Tracker
from psyche_fast.rank import state
from tests.core.test_run import COMMON, DISTRO, start, train
from tests.groups import in_process, run_command

pytestmark = pytest.mark.processes

WORLDS = {
    "AdamW": (["--grad-accum-in-fp32", "--param-dtype", "bfloat16"], 1),
    "AdamW, bf16 masters": (["--param-dtype", "bfloat16", "--master-dtype", "bfloat16"], 1),
    "AdamW 1x2x2": (["--data-parallelism", "2", "--tensor-parallelism", "2"], 4),
    "DisTrO alone": ([*DISTRO, "--param-dtype", "bfloat16", "--delta-dtype", "bfloat16"], 1),
    "DisTrO 2, signs": ([*DISTRO, "--distro-quantization", "--replicas", "2"], 2),
    "DisTrO 2x2": (
        [*DISTRO, "--replicas", "2", "--data-parallelism", "2", "--param-dtype", "bfloat16",
         "--weight-decay", "20", "--decay", "matrices"],
        4,
    ),
}  # fmt: skip


def parameters(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def states(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}" / "state"
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {f"{f.name} {n}": t for f in files for n, t in load_file(f).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(t.view(-1).view(torch.uint8), other[n].view(-1).view(torch.uint8))
               for n, t in one.items())  # fmt: skip


def without_later(run: Path, copy: Path, step: int) -> Path:
    """The run as it was when it was killed after a step's checkpoint."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if folder.name > f"step-{step:06d}":
            shutil.rmtree(folder)
    return copy


def settings(run: Path) -> dict[str, Any]:
    """What `--config` would take, but for the names of its own place."""
    tables = tomllib.loads((run / "config.toml").read_text())
    values = {name: value for table in tables.values() for name, value in table.items()}
    return {name: value for name, value in values.items() if name not in ("output", "port")}


@pytest.mark.parametrize("name", WORLDS)
def test_every_bit(name: str, place: Path, tmp_path: Path) -> None:
    given, ranks = WORLDS[name]
    for step in (1, 2) if "DisTrO 2," in name else (2,):
        # One at a time: the checkpoint of step 2 may be left out while that of step 1 is written.
        arguments = [*given, "--checkpoint-every", str(step), "--total-steps", "4"]
        run = tmp_path / f"whole-{step}"
        whole = train(place, run, *arguments, ranks=ranks)
        part = without_later(run, tmp_path / f"part-{step}", step)
        result = start(place, part, *arguments, "--resume", "auto", ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert f"step-{step:06d}, from step {step + 1}" in result.stderr
        assert settings(part) == settings(run)
        lines = [json.loads(x) for x in (part / "metrics.jsonl").read_text().splitlines()]
        for known in ("step", "loss", "learning_rate", "num_tokens"):
            assert [m[known] for m in lines] == [m[known] for m in whole], known
        assert same(parameters(part, 4), parameters(run, 4))
        assert same(states(part, 4), states(run, 4))


def change(checkpoint: Path, prefix: str) -> None:
    """Makes other numbers of the tensors of a name in the state, and its manifest fit."""
    changed = False
    manifest = state.read_manifest(checkpoint)
    files = []
    for file in manifest.files:
        path = checkpoint / "state" / file.name
        tensors = load_file(path)
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        for name in tensors:
            if name.startswith(prefix) and not name.endswith("@rows"):
                other = torch.Generator().manual_seed(5).get_state()
                tensors[name] = other if name == "random/cpu" else tensors[name].roll(1)
                changed = True
        save_file(tensors, path, metadata)
        files.append(state.sealed(path))
    assert changed
    fields = {f: getattr(manifest, f) for f in manifest.__struct_fields__}
    state.write_manifest(checkpoint / "state", state.Manifest(**{**fields, "files": files}))


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two replicas with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("finished") / "run"
    arguments = [*DISTRO, "--replicas", "2", "--checkpoint-every", "2", "--total-steps", "4"]
    train(place, run, *arguments, ranks=2)
    return run


def go_on(place: Path, run: Path, *arguments: str, ranks: int = 2) -> Any:
    return start(
        place, run, *DISTRO, "--replicas", str(ranks), "--total-steps", "6", *arguments,
        ranks=ranks,
    )  # fmt: skip


def refused(place: Path, run: Path, *arguments: str) -> Any:
    """What rank 0 says before there are others."""
    result = start(
        place, run, *DISTRO, "--replicas", "2", "--total-steps", "6", *arguments, "--dry-run"
    )
    assert result.returncode == 2
    return result


def test_a_damaged_checkpoint_is_named_and_passed_over(
    place: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    bad = run / "checkpoints" / "step-000004" / "state" / "rank-00001.safetensors"
    content = bytearray(bad.read_bytes())
    content[-3] ^= 16
    bad.write_bytes(content)
    (run / "checkpoints" / ".state-000005").mkdir()
    (run / "checkpoints" / ".step-000006.tmp-99999999").mkdir()
    (run / "checkpoints" / "step-000007").mkdir()
    result = refused(place, run, "--resume", "4")
    assert result.stderr.strip().splitlines()[-1].count(f"{bad} is damaged") == 1
    result = go_on(place, run, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert f"passed over {bad} is damaged" in result.stderr
    assert "step-000002, from step 3" in result.stderr
    assert sorted(os.listdir(run / "checkpoints")) == [
        "step-000002", "step-000004", "step-000006", "step-000007"
    ]  # fmt: skip


@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_come_and_go(
    replicas: int,
    place: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    result = go_on(place, run, "--resume", str(run), "--check-every", "1", ranks=replicas)
    assert result.returncode == 0, result.stderr
    assert f"--replicas 2 -> {replicas}" in result.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_another_runs_state_is_refused_and_forked(
    place: Path,
    finished: Path,
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    arguments = ["--learning-rate", "0.001", "--weight-decay", "0"]
    result = refused(place, other, *arguments, "--resume", str(finished))
    line = result.stderr.strip().splitlines()[-1]
    assert "--weight-decay 0.1 -> 0.0, --learning-rate 0.01 -> 0.001 since" in line
    assert "--fork" in line
    assert not other.exists()
    result = go_on(place, other, *arguments, "--fork", str(finished))
    assert result.returncode == 0, result.stderr
    assert "changed  --weight-decay 0.1 -> 0.0, --learning-rate 0.01 -> 0.001" in result.stderr
    forked = [json.loads(x) for x in (other / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in forked] == [5, 6]
    assert forked[0]["learning_rate"] < 0.001
    narrower = ["--fork", str(finished), "--compression-topk", "4"]
    result = go_on(place, tmp_path / "narrower", *narrower)
    assert result.returncode == 0, result.stderr
    assert "another form: only parameters are taken up" in result.stderr
    result = refused(place, other, "--fork", str(finished))
    assert "already holds a run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--resume", "auto"], "--resume auto needs --output"),
        (["--resume", "3", "--output", "RUN"], "no checkpoint of step 3"),
        (["--resume", "2", "--output", "RUN"], "checkpoints of later steps (step-000004)"),
        (["--resume", "nowhere"], "nowhere is neither a checkpoint nor a run directory"),
        (["--resume", "RUN", "--total-steps", "4"], "nothing is left of --total-steps 4"),
        (["--resume", "RUN", "--start-step", "2"], "--start-step 2"),
        (["--resume", "RUN", "--fork", "RUN"], "--resume and --fork: give one of them"),
        (["--resume", "RUN", "--data-path", "OTHER"], "is not the data that"),
        (["--resume", "RUN", "--micro-batch", "4"], "--micro-batch 2 -> 4 since"),
    ],
)
def test_what_cannot_be_gone_on_from(
    place: Path,
    finished: Path,
    tmp_path: Path,
    arguments: list[str],
    what: str,
) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    content = bytearray((place / "data" / "tokens.bin").read_bytes())
    content[0:2] = b"\x07\x00"
    (tmp_path / "data" / "tokens.bin").write_bytes(content)
    names = {"RUN": str(finished), "OTHER": str(tmp_path / "data")}
    result = run_command(
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"), *COMMON,
        *DISTRO, "--replicas", "2", *(names.get(a, a) for a in arguments), "--dry-run",
    )[0]  # fmt: skip
    assert result.returncode == 2
    assert what in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_diff_names_where_runs_and_checkpoints_part(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    same_ones = run_command("diff", str(finished), str(other))[0]
    assert (same_ones.returncode, same_ones.stdout) == (
        0, "the same, to the bit: losses of 4 steps, 2 checkpoints\n"
    )  # fmt: skip
    change(other / "checkpoints" / "step-000002", "optimizer/delta/lm_head.weight")
    change(other / "checkpoints" / "step-000004", "parameter/model.norm.weight")
    result = run_command("diff", str(finished), str(other))[0]
    assert result.returncode == 1
    first, second = result.stdout.splitlines()
    assert first.startswith(
        "checkpoint of step 2: state/rank-00000/optimizer/delta/lm_head.weight: "
    )
    assert second.startswith("state/rank-00001/optimizer/delta/lm_head.weight: ")
    pair = [str(run / "checkpoints" / "step-000004") for run in (finished, other)]
    result = run_command("diff", *pair)[0]
    assert result.returncode == 1
    assert "state/parameters-00000/parameter/model.norm.weight: " in result.stdout
    result = run_command("diff", str(finished), pair[0])[0]
    assert result.returncode == 2
    assert "name two of one kind" in result.stderr


def test_a_state_that_cannot_be_written_costs_no_run(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".state-000002").write_text("in the way")
    result = start(place, run, "--checkpoint-every", "2", "--total-steps", "4", "--keep", "1")
    assert result.returncode == 0, result.stderr
    assert "checkpoint of step 2 not written: rank 0: " in result.stderr
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-000004"]
    assert parameters(run, 4)
    assert states(run, 4)


def test_flags_that_may_change_exist() -> None:
    assert set(FLAGS) >= _FREE


def test_auto_begins_where_there_is_nothing_yet(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')  # killed before its first
    lines = train(place, tmp_path / "run", "--resume", "auto", "--total-steps", "1")
    assert [m["step"] for m in lines] == [1]
    assert "loss" in lines[0]


def test_auto_begins_anew_where_the_first_state_was_being_written(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(place, run, "--total-steps", "1")
    (run / "checkpoints" / "step-000001" / "state").rename(run / "checkpoints" / ".state-000001")
    (run / "checkpoints" / "step-000001").rename(run / "checkpoints" / ".step-000001.tmp-99999999")
    lines = train(place, run, "--total-steps", "2", "--resume", "auto")
    assert [m["step"] for m in lines] == [1, 2]
    # A model whose state could not be written, say: nothing is begun over it.
    shutil.rmtree(run / "checkpoints" / "step-000002" / "state")
    result = start(place, run, "--total-steps", "3", "--resume", "auto")
    assert result.returncode == 2
    assert "no checkpoint that can be gone on from" in result.stderr


def test_the_models_copy_has_no_state(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "run", "--total-steps", "1", "--save-path", str(tmp_path / "final"))
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "state" / "manifest.json").exists()
    assert not (tmp_path / "final" / "state").exists()


def _names_at_a_tracker(place: Path, output: Path) -> list[str | None]:
    """What a run, one that goes on from it and one that is forked are to be called."""
    given: list[str | None] = []

    class Recorder(Tracker):
        id = "known as this"

    def make(*_: Any, id: str | None = None, **__: Any) -> Tracker:
        given.append(id)
        return Recorder()

    first = {"output": str(output / "run"), "total_steps": 1}
    goes_on = {"output": str(output / "run"), "total_steps": 2, "resume": "auto"}
    forked = {"output": str(output / "other"), "total_steps": 3, "fork": str(output / "run")}
    with (
        mock.patch.object(core, "make_tracker", side_effect=make),
        mock.patch.object(core, "plot_run"),
    ):
        for part in (first, goes_on, forked):
            core.run(
                make_plan(
                    RunConfig.of(
                        model=str(place / "model"), data_path=str(place / "data"), device="cpu",
                        sequence_length=16, micro_batch=2, total_batch=2, param_dtype="float32",
                        threads=1, warmup_steps=0, **part,
                    )
                )
            )  # fmt: skip
    return given


def test_a_tracker_goes_on_with_the_run_that_goes_on(place: Path, tmp_path: Path) -> None:
    assert in_process(_names_at_a_tracker, place, tmp_path) == [None, "known as this", None]
