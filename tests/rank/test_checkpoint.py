from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from psyche_fast.core.run import _save
from psyche_fast.models import load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank import checkpoint
from psyche_fast.rank.checkpoint import atomic_folder, save_model, write_tensors
from tests.groups import running
from tests.processes import wait_until
from tests.tiny import save_llama


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_loads_in_plain_transformers_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    source = resolve_model(str(save_llama(tmp_path / "model", tie_word_embeddings=tied)))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    source = resolve_model(str(tmp_path / "model"))
    model = load_model(source, device=torch.device("cpu"), param_dtype=torch.float32)
    save_model(tmp_path / "out", model, model.full_state_dict_iter(), source.side_files)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[n], original[n]) for n in original)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((100,), float(n)) for n in range(5)}
    write_tensors(tmp_path, iter(tensors.items()), max_bytes=900)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == [
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"


def test_a_failed_write_keeps_the_old_folder_and_leaves_nothing(tmp_path: Path) -> None:
    source = resolve_model(str(save_llama(tmp_path / "model")))
    model = load_model(source, device=torch.device("cpu"), param_dtype=torch.float32)
    save_model(tmp_path / "out", model, model.full_state_dict_iter(), [])
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    seen = []

    def failing() -> Iterator[tuple[str, Tensor | None]]:
        for name, tensor in model.full_state_dict_iter():
            seen.append(name)
            yield name, tensor

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psyche_fast.rank.checkpoint.save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_model(tmp_path / "out", model, failing(), [])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "out"]
    assert len(seen) == len(list(model.full_state_dict_iter())), "other ranks are not left waiting"


def _save_until(moment: str, path: Path, value: float, reached: Path) -> None:
    """Begins a save, and stops for good at a moment in it: a tensor's, or the first file's sync."""

    def stop(*_: object) -> None:
        reached.touch()
        signal.pause()

    with atomic_folder(path) as folder:
        if moment == "while files are written":
            write_tensors(folder, iter([("a", torch.full((9,), value))]))
            stop()
        os.fsync = stop
    raise AssertionError("the save came to its end")


def test_a_folder_is_on_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced, fsync = tmp_path / "runs" / "step-000005", [], os.fsync

    def note(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with atomic_folder(path) as folder:
        (folder / "state").mkdir()
        (folder / "state" / "part").write_bytes(b"1")
        (folder / "config.json").write_bytes(b"2")
    *within, last = synced
    names = {"part", "state", "config.json", f".step-000005.tmp-{os.getpid()}"}
    assert set(within) == {(name, False) for name in names}
    assert last == ("runs", True), "and the name itself"


@pytest.mark.processes
@pytest.mark.parametrize("moment", ["while files are written", "before they take their name"])
@pytest.mark.parametrize("older", [True, False])
def test_a_kill_during_a_save_leaves_what_was_there(
    tmp_path: Path, older: bool, moment: str
) -> None:
    path, reached = tmp_path / "runs" / "step-000005", tmp_path / "reached"

    def save(value: float, step: int = 5) -> None:
        with atomic_folder(path.with_name(f"step-{step:06d}")) as folder:
            write_tensors(folder, iter([("a", torch.full((9,), value))]))

    def names() -> list[str]:
        return sorted(f.name for f in path.parent.iterdir())

    if older:
        save(1.0)
    with running(_save_until, moment, path, 2.0, reached) as process:
        wait_until(reached.exists)
        save(4.0, step=4)
        left = f".step-000005.tmp-{process.pid}"
        assert left in names(), "it is being written"
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.exists() == older
    if older:
        assert (load_file(path / "model.safetensors")["a"] == 1.0).all()
    assert left in names()
    save(6.0, step=6)
    assert left not in names(), "a later step removes it"
    (path.parent / f".final.tmp-{process.pid}").mkdir()
    save(3.0)
    assert (load_file(path / "model.safetensors")["a"] == 3.0).all()
    others = [f".final.tmp-{process.pid}", "step-000004", "step-000006"]  # not all are a run's own
    assert names() == sorted([*others, "step-000005"])


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text)


def can_exchange(folder: Path) -> bool:
    (folder / "x").mkdir()
    (folder / "y").mkdir()
    return checkpoint._exchange(folder / "x", folder / "y")


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    out = tmp_path / "runs" / "out"
    fill(out, "old")
    moved = []
    monkeypatch.setattr(Path, "rename", lambda *names: moved.append(names))
    fill(out, "new")
    assert moved == [], "between two renames there would be no folder of that name"
    assert [(out / name).read_text() for name in ("a", "b")] == ["new", "new"]
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_where_names_cannot_be_exchanged_the_old_folder_comes_back_on_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    fill(out, "old")
    fill(out, "new")
    assert (out / "a").read_text() == "new"
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        fill(out, "newest")
    assert (out / "a").read_text() == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_that_nothing_has_replaced_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in ("step-1", "step-2"):  # killed between two renames, and after them
        (tmp_path / f".{name}.old-{dead.pid}").mkdir()
    fill(tmp_path / "step-2", "new")
    fill(tmp_path / "step-3", "new")
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == [f".step-1.old-{dead.pid}", "step-2", "step-3"]


def test_an_exchange_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    with pytest.raises(FileNotFoundError):
        checkpoint._exchange(tmp_path / "x", tmp_path / "absent")


def test_what_came_to_the_folder_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    checkpoint, path = tmp_path / "step", tmp_path / "final"
    checkpoint.mkdir()
    (checkpoint / "model").write_text("new")
    path.mkdir()  # empty, as when the run began
    assert _save(str(path), checkpoint) is None
    assert [f.name for f in path.iterdir()] == ["model"]
    (path / "notes").write_text("somebody's")
    error = _save(str(path), checkpoint)
    assert error is not None
    assert str(error).startswith(f"--save-path {path}: ")
    assert str(error).endswith(f"the model is in {checkpoint}")
    assert sorted(f.name for f in path.iterdir()) == ["model", "notes"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["final", "step"]


def test_a_checkpoint_without_what_its_configuration_promises_is_kept_and_refused(
    tmp_path: Path,
) -> None:
    source = resolve_model(str(save_llama(tmp_path / "model")))
    model = load_model(source, device=torch.device("cpu"), param_dtype=torch.float32)
    tensors = dict(model.full_state_dict_iter())
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    with pytest.raises(ValueError, match=r"out cannot be loaded again as it is: .*norm.weight"):
        save_model(tmp_path / "out", model, iter(tensors.items()), [])
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
