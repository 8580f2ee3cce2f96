"""States by pieces: the very same whole in whatever world it is taken up, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.core.export import Exporter
from psyche_fast.distro.message import MessageFormat
from psyche_fast.models.source import resolve_model
from psyche_fast.rank import state
from psyche_fast.rank.saving import restore
from psyche_fast.rank.serve import build_trainer
from psyche_fast.rank.state import Manifest, Piece
from tests.groups import run_ranks
from tests.tiny import random_tokens, save_llama

COMMON: dict[str, Any] = {
    "param_dtype": "bfloat16", "sequence_length": 16, "micro_batch": 2, "total_batch": 4,
    "warmup_steps": 0, "compression_chunk": 12, "compression_topk": 3, "threads": 1,
    "checkpoint_every": 0,
}  # fmt: skip


def settings(method: str, dp: int, tp: int, **changes: Any) -> RunConfig:
    return RunConfig.of(
        **COMMON, distro=method == "distro", data_parallelism=dp, tensor_parallelism=tp, **changes
    )


def write(rank: int, trainer: Any, config: RunConfig, folder: Path, step: int) -> None:
    """What the ranks and the core write of a step."""
    import torch.distributed as dist

    place = folder / state.FOLDER
    trainer.plain()
    files = [
        state.write_part(place, state.rank_file(rank), trainer.state()),
        state.write_part(place, state.parameters_file(rank), trainer.parameter_state()),
    ]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, files)
    if rank == 0:
        manifest = Manifest(
            version=state.VERSION, step=step, config=config.to_dict(), data={}, machine={},
            files=[file for own in everyones for file in own],
        )  # fmt: skip
        state.write_manifest(place, manifest)
    dist.barrier()
    gathered = {n: t for n, t in trainer.model.full_state_dict_iter() if t is not None}
    if rank == 0:  # in another way: from the ranks themselves
        save_file({n: t.contiguous() for n, t in gathered.items()}, folder / "gathered.safetensors")


def check_export(folder: Path, model: Path, config: RunConfig) -> None:
    """A model's folder made of what ranks have written is what these ranks give."""
    exporter = Exporter(resolve_model(str(model)), config.model, all_names=False)
    out = folder / "out"
    out.mkdir()
    exporter.write(out, folder / state.FOLDER, state.read_manifest(folder).files)
    made, wanted = load_file(out / "model.safetensors"), load_file(folder / "gathered.safetensors")
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name


def first(rank: int, model: Path, config: RunConfig, folder: Path) -> None:
    """Trains two steps and writes."""
    trainer = build_trainer(config, resolve_model(str(model)), torch.device("cpu"))
    for step in (1, 2):
        trainer.train(step, Batch(random_tokens(4, 16, seed=step)))
        trainer.optimize(step)
    write(rank, trainer, config, folder, 2)


def second(rank: int, model: Path, config: RunConfig, folder: Path) -> float:
    """Takes up what another world wrote, writes it again, and trains on."""
    trainer = build_trainer(config, resolve_model(str(model)), torch.device("cpu"))
    restore(trainer, config)
    write(rank, trainer, config, folder, 2)
    output = trainer.train(3, Batch(random_tokens(4, 16, seed=3)))
    trainer.optimize(3)
    return float(output.loss)


def whole(folder: Path) -> dict[str, Tensor]:
    """Everything that a state has, put together from its files in a way of the test's own."""
    found: dict[str, Tensor] = {}
    for path in sorted((folder / state.FOLDER).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["places"])
            names = list(file.keys())
            for name in names:
                if name.endswith("@rows") or name.startswith("random/"):
                    continue
                tensor = file.get_tensor(name)
                if f"{name}@rows" in names:
                    *rows, count = file.get_tensor(f"{name}@rows").tolist()
                    into = found.setdefault(name, tensor.new_zeros(count, *tensor.shape[1:]))
                    into[rows] = tensor
                elif name in places:
                    sizes = [size for _, _, size in places[name]]
                    into = found.setdefault(name, tensor.new_zeros(sizes))
                    into[tuple(slice(a, b) for a, b, _ in places[name])] = tensor
                else:
                    assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


def lying(rank: int, model: Path, config: RunConfig, folder: Path, resumes: bool) -> int:
    """Trains six steps, replica 1 lying in the first three; writes the fifth, and the last."""
    trainer = build_trainer(config, resolve_model(str(model)), torch.device("cpu"))
    pack = MessageFormat.pack
    step = 0

    def damaged(self: MessageFormat, *arguments: Any) -> Tensor:
        message = pack(self, *arguments)
        if rank == 1 and step < 4:
            message[0] ^= 1
        return message

    if resumes:
        restore(trainer, config)
    with mock.patch.object(MessageFormat, "pack", damaged):
        for step in range(6 if resumes else 1, 9):
            trainer.train(step, Batch(random_tokens(4, 16, seed=step)))
            trainer.optimize(step)
            if step == 5 and not resumes:
                write(rank, trainer, config, folder, 5)
    write(rank, trainer, config, folder.with_name("resumed" if resumes else "last"), 8)
    return trainer.refusals["left_out_results"]["1"]


@pytest.mark.processes
def test_who_is_left_out_stays_out(model: Path, tmp_path: Path) -> None:
    config = settings("distro", 1, 1, replicas=2)
    assert run_ranks(lying, 2, model, config, tmp_path / "fifth", False) == [46, 46]
    again = config.replace(resume=str(tmp_path / "fifth"))
    assert run_ranks(lying, 2, model, again, tmp_path / "fifth", True) == [46, 46]
    one, other = whole(tmp_path / "last"), whole(tmp_path / "resumed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "optimizer/standing" in one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("state") / "model", vocab_size=102, hidden_size=24,
                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip


WORLDS = {  # ranks of data and of tensor parallelism, and what others take it up
    (1, 1): [(2, 2)],
    (2, 1): [(1, 2)],
    (1, 2): [(2, 1), (1, 1)],
    (2, 2): [(2, 1), (1, 1)],
}


@pytest.mark.processes
@pytest.mark.parametrize("method", ["adamw", "distro"])
@pytest.mark.parametrize("before", WORLDS, ids=str)
def test_another_world_takes_up_the_same(
    method: str, before: tuple[int, int], model: Path, tmp_path: Path
) -> None:
    """Shards that cut chunks, uneven ones, empty ones: everything as it was, to the bit."""
    run_ranks(first, before[0] * before[1], model, settings(method, *before), tmp_path / "a")
    wanted = whole(tmp_path / "a")
    check_export(tmp_path / "a", model, settings(method, *before))
    kinds = {"optimizer/delta/lm_head.weight", "optimizer/own/lm_head.weight/indices",
             "optimizer/arrived/model.norm.weight/values"}  # fmt: skip
    if method == "adamw":
        kinds = {"optimizer/lm_head.weight/exp_avg", "optimizer/model.norm.weight/step"}
    assert kinds | {"parameter/lm_head.weight", "master/model.norm.weight"} <= wanted.keys()
    losses = []
    for number, after in enumerate(WORLDS[before]):
        config = settings(method, *after, resume=str(tmp_path / "a"))
        folder = tmp_path / str(number)
        losses.append(sum(run_ranks(second, after[0] * after[1], model, config, folder)))
        losses[-1] /= after[0] * after[1]
        found = whole(folder)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (after, name)
    assert max(losses) - min(losses) < 0.02


@pytest.mark.processes
def test_experts_are_exported_as_they_came(tmp_path: Path) -> None:
    """One by one, though the ranks hold them stacked and divided; tied weights once."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=102, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = tmp_path / "mixtral"
    transformers.MixtralForCausalLM(config).save_pretrained(model)
    run = settings("adamw", 2, 2, save_dtype="float32")  # the masters
    run_ranks(first, 4, model, run, tmp_path / "a")
    check_export(tmp_path / "a", model, run)
    names = load_file(tmp_path / "a" / "out" / "model.safetensors").keys()
    assert names == load_file(model / "model.safetensors").keys()
    assert any("experts.3.w2" in name for name in names)


def reader(folder: Path, *pieces: dict[str, Piece]) -> state.Reader:
    files = [
        state.write_part(folder / state.FOLDER, state.rank_file(n), own)
        for n, own in enumerate(pieces)
    ]
    return state.Reader(folder / state.FOLDER, files, files[0].name, [file.name for file in files])


def part(start: int, stop: int) -> Piece:
    return Piece(torch.arange(start, stop).float(), (slice(start, stop),), (8,))


def test_pieces_are_read_wherever_they_lie(tmp_path: Path) -> None:
    rows = Piece(torch.tensor([[5.0], [1.0]]), whole=(6,), rows=torch.tensor([5, 1]))
    more = Piece(torch.tensor([[0.0], [2.0], [3.0]]), whole=(6,), rows=torch.tensor([0, 2, 3]))
    read = reader(tmp_path, {"a": part(0, 3), "r": rows}, {"a": part(3, 8), "r": more})
    like = Piece(torch.empty(5), (slice(2, 7),), (8,))
    assert read.read("a", like).tolist() == [2, 3, 4, 5, 6]
    assert read.read("a", Piece(torch.empty(8))).tolist() == list(range(8))
    wanted = Piece(torch.empty(3, 1), whole=(6,), rows=torch.tensor([3, 5, 0]))
    assert read.read("r", wanted).tolist() == [[3], [5], [0]]
    for name, piece, what in (
        ("a", Piece(torch.empty(9)), "torch.float32 [8], wanted torch.float32 [9]"),
        ("a", Piece(torch.empty(8, dtype=torch.bfloat16)), "wanted torch.bfloat16"),
        ("b", Piece(torch.empty(8)), "no b"),
        ("r", Piece(torch.empty(1, 1), whole=(6,), rows=torch.tensor([4])), "not all of it"),
    ):
        with pytest.raises(ValueError, match=what.replace("[", r"\[")):
            read.read(name, piece)


def test_what_ranks_have_twice_does_not_stand_for_what_is_missing(tmp_path: Path) -> None:
    read = reader(tmp_path, {"a": part(0, 4)}, {"a": part(0, 4)})
    with pytest.raises(ValueError, match="not all of it"):
        read.read("a", Piece(torch.empty(8)))


def test_a_file_that_is_no_state(tmp_path: Path) -> None:
    (tmp_path / state.FOLDER).mkdir()
    path = tmp_path / state.FOLDER / state.rank_file(0)
    save_file({"a": torch.zeros(1)}, path)
    manifest = Manifest(
        version=1, step=1, config={}, data={}, machine={}, files=[state.sealed(path)]
    )
    read = state.Reader(path.parent, manifest.files, path.name, [])
    with pytest.raises(ValueError, match="is no file of a state"):
        read.tensor("a")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        state.Reader(path.parent, manifest.files, path.name, []).tensor("a")


@pytest.mark.parametrize(
    ("name", "hostile", "wanted", "says"),
    [
        ("a", Piece(torch.arange(4.0), (slice(6, 10),), (8,)), part(0, 8), "place of a"),
        ("a", Piece(torch.arange(4.0), (slice(-2, 2),), (8,)), part(0, 8), "place of a"),
        ("a", Piece(torch.arange(2.0), (slice(0, 8),), (8,)), part(0, 8), "place of a"),
        ("r", Piece(torch.zeros(1, 1), whole=(6,), rows=torch.tensor([6])), None, "not among"),
        ("r", Piece(torch.zeros(1, 1), whole=(6,), rows=torch.tensor([-1])), None, "not among"),
        ("r", Piece(torch.zeros(2, 1), whole=(6,), rows=torch.tensor([0])), None, "rows of r are"),
    ],
)  # fmt: skip
def test_places_that_are_not_in_the_whole_are_refused(
    tmp_path: Path, name: str, hostile: Piece, wanted: Piece | None, says: str
) -> None:
    read = reader(tmp_path, {name: hostile})
    rows = Piece(torch.empty(1, 1), whole=(6,), rows=torch.tensor([5]))
    with pytest.raises(ValueError, match=says):
        read.read(name, wanted or rows)


@pytest.mark.parametrize("name", ["../out", "../../out", "/etc/hostname", "more/out"])
@pytest.mark.parametrize("which", ["files", "model"])
def test_a_manifest_names_no_file_outside_of_its_folder(
    tmp_path: Path, name: str, which: str
) -> None:
    folder = tmp_path / "checkpoint"
    (folder / state.FOLDER / "more").mkdir(parents=True)
    (folder / "more").mkdir()
    for place in (tmp_path, folder, folder / "more", folder / state.FOLDER / "more"):
        (place / "out").write_bytes(b"somebody's")
    file = state.StateFile(name=name, size=len(b"somebody's"), sha256="0" * 64)
    lists = {"files": [], "model": [], which: [file]}
    manifest = Manifest(
        version=state.VERSION, step=1, config={}, data={}, machine={},
        files=lists["files"], model=lists["model"],
    )  # fmt: skip
    state.write_manifest(folder / state.FOLDER, manifest)
    with pytest.raises(ValueError, match=f"'{name}' is no file of its folder"):
        state.read_manifest(folder)


def test_files_are_on_disk_before_a_manifest_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert path.is_dir() or path.stat().st_size > 0
        synced.append(path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    folder = tmp_path / state.FOLDER
    file = state.write_part(folder, state.rank_file(0), {"a": Piece(torch.zeros(2))})
    assert synced == ["rank-00000.safetensors"]
    manifest = Manifest(version=state.VERSION, step=1, config={}, data={}, machine={}, files=[file])
    state.write_manifest(folder, manifest)
    assert synced[1:] == ["manifest.json", "state"]
