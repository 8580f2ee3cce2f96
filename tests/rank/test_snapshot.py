"""A snapshot taken beside the next step: a run goes on from it as if nothing had happened."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.distro.replicas import ReplicasDiffer
from psyche_fast.models.source import resolve_model
from psyche_fast.rank import state
from psyche_fast.rank.saving import restore
from psyche_fast.rank.serve import build_trainer
from psyche_fast.rank.state import Manifest
from psyche_fast.rank.trainer import Trainer
from tests.groups import run_ranks
from tests.tiny import random_tokens, save_llama

COMMON: dict[str, Any] = {
    "param_dtype": "float32", "sequence_length": 16, "micro_batch": 2, "total_batch": 4,
    "learning_rate": 1e-2, "warmup_steps": 0, "compression_chunk": 12, "compression_topk": 3,
    "threads": 1,
}  # fmt: skip
DISTRO: dict[str, Any] = {"distro": True, "distro_quantization": True}
BF16: dict[str, Any] = {"param_dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, packed, no masters": {**BF16, "master_dtype": "bfloat16", "packed": True},
    "AdamW, chunked, masters": {**BF16, "loss": "chunked", "grad_accum_in_fp32": True},
    "DisTrO": {"distro": True, "activation_checkpointing": True},
    "DisTrO, packed, offloaded": {**DISTRO, **BF16, "offload_delta": True, "packed": True},
    "DisTrO, narrow, decay": {
        **DISTRO, **BF16, "master_dtype": "bfloat16", "delta_dtype": "bfloat16",
        "weight_decay": 20.0, "decay": "matrices",
    },
}  # fmt: skip
"""All with dropout; saved after the first step or the second one, in turns."""
COMPILED: dict[str, dict[str, Any]] = {
    "AdamW, compiled": {"compile": True},
    "DisTrO, compiled": {**DISTRO, **BF16, "compile": True},
}
LAST = 4
EVERYTHING = "SNAPSHOT_MATRIX" in os.environ
"""Each case after both steps, more worlds and compiled blocks: minutes, by hand."""
by_hand = pytest.mark.skipif(not EVERYTHING, reason="minutes; SNAPSHOT_MATRIX=1 has it")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot") / "model"
    return save_llama(folder, vocab_size=102, hidden_size=24, attention_dropout=0.3)


def trainer_of(model: Path, changes: dict[str, Any]) -> tuple[Trainer, RunConfig, bool]:
    settings = {**COMMON, **changes}
    packed = settings.pop("packed", False)
    config = RunConfig.of(**settings)
    torch.manual_seed(1337)
    trainer = build_trainer(config, resolve_model(str(model)), torch.device("cpu"))
    restore(trainer, config)
    return trainer, config, packed


def step_of(trainer: Trainer, step: int, packed: bool) -> None:
    positions = torch.tensor([[*range(10), *range(6)]] * 4) if packed else None
    replica = trainer.topology.replica
    trainer.train(
        step, Batch(random_tokens(4, 16, seed=10 * step + replica), position_ids=positions)
    )
    trainer.optimize(step)


def write(folder: Path, files: dict[str, state.State], config: RunConfig, step: int) -> None:
    """What ranks and core write."""
    written = [
        state.write_part(folder / state.FOLDER, name, pieces) for name, pieces in files.items()
    ]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, written)
    if dist.get_rank() == 0:
        manifest = Manifest(
            version=state.VERSION, step=step, config=config.to_dict(), data={}, machine={},
            files=[file for own in everyones for file in own],
        )  # fmt: skip
        state.write_manifest(folder / state.FOLDER, manifest)
    dist.barrier()


def digest(files: dict[str, state.State]) -> str:
    """Of every bit of a rank's state."""
    found = hashlib.sha256()
    for name, pieces in sorted(files.items()):
        for key, piece in sorted(pieces.items()):
            found.update(f"{name} {key} {piece.dtype or piece.tensor.dtype}".encode())
            found.update(piece.on_host().tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def end_of(trainer: Trainer, first: int, packed: bool) -> str:
    for step in range(first, LAST + 1):
        step_of(trainer, step, packed)
    trainer.plain()
    return digest(trainer.files())


def go_through(
    rank: int, model: Path, folder: Path, cases: dict[str, dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Where runs without a snapshot, with one, at once and from it end; what differs."""
    wrong = []
    for number, (name, changes) in enumerate(cases.items()):
        trainer, _, packed = trainer_of(model, changes)
        wanted = end_of(trainer, 1, packed)
        for at in (1, 2) if EVERYTHING else (2 - number % 2,):
            place = folder / f"{name} {at}"
            given: list[Any] = []
            trainer, config, _ = trainer_of(model, changes)
            for step in range(1, at + 1):
                step_of(trainer, step, packed)
            trainer.take_snapshot(at, given.append)
            ends = {"with": end_of(trainer, at + 1, packed)}
            assert isinstance(given[0], dict), given
            trainer, _, _ = trainer_of(model, changes)
            for step in range(1, at + 1):
                step_of(trainer, step, packed)
            trainer.plain()
            at_once = trainer.files()
            if digest(given[0]) != digest(at_once):
                wrong.append((name, str(at), "the snapshot is not what is written at once"))
            write(place, given[0], config, at)
            trainer, _, _ = trainer_of(model, {**changes, "resume": str(place)})
            ends["from"] = end_of(trainer, at + 1, packed)
            wrong += [(name, str(at), how) for how, end in ends.items() if end != wanted]
    return wrong


@pytest.mark.processes
def test_every_bit_of_one_rank(model: Path, tmp_path: Path) -> None:
    assert run_ranks(go_through, 1, model, tmp_path, CASES) == [[]]


@pytest.mark.processes
@pytest.mark.parametrize(
    "case",
    [
        {**DISTRO, **BF16, "replicas": 2, "data_parallelism": 2},  # chunks that are cut
        pytest.param({"data_parallelism": 2, "tensor_parallelism": 2, **BF16}, marks=by_hand),
        pytest.param({**DISTRO, "replicas": 2, "tensor_parallelism": 2}, marks=by_hand),
    ],
    ids=lambda case: "x".join(str(case.get(f"{n}_parallelism", 1)) for n in ("data", "tensor")),
)
def test_every_bit_of_several_ranks(model: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    assert run_ranks(go_through, 4, model, tmp_path, {"case": case}) == [[], [], [], []]


@by_hand
@pytest.mark.processes
def test_every_bit_of_compiled_blocks(model: Path, tmp_path: Path) -> None:
    assert run_ranks(go_through, 1, model, tmp_path, COMPILED) == [[]]


PIECES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "AdamW": (
        BF16,
        ["parameter/lm_head.weight", "master/model.norm.weight", "random/cpu",
         "buffer/model.rotary_emb.inv_freq", "optimizer/lm_head.weight/exp_avg",
         "optimizer/lm_head.weight/exp_avg_sq", "optimizer/lm_head.weight/step"],
    ),
    "DisTrO": (
        {"distro": True},
        ["parameter/lm_head.weight", "random/cpu", "optimizer/delta/lm_head.weight",
         "optimizer/own/lm_head.weight/indices", "optimizer/own/lm_head.weight/values",
         "optimizer/arrived/lm_head.weight/indices", "optimizer/arrived/lm_head.weight/values",
         "optimizer/under_way", "optimizer/refused", "optimizer/exchanges"],
    ),
}  # fmt: skip


def altered(folder: Path, copy: Path, piece: str) -> None:
    """A copy of a checkpoint in which one piece is another, and whose sums fit."""
    shutil.copytree(folder, copy)
    manifest, files, found = state.read_manifest(copy), [], False
    for file in manifest.files:
        path = copy / state.FOLDER / file.name
        tensors = load_file(path)
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        if piece in tensors:
            found, tensor = True, tensors[piece]
            if piece == "random/cpu":
                tensors[piece] = torch.Generator().manual_seed(5).get_state()
            elif tensor.dim() == 0:
                tensors[piece] = tensor - 1
            else:
                tensors[piece] = tensor.flip(-1) if tensor.shape[-1] > 1 else tensor.flip(0)
        save_file(tensors, path, metadata)
        files.append(state.sealed(path))
    assert found, piece
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    state.write_manifest(copy / state.FOLDER, Manifest(**{**fields, "files": files}))


def without_each(rank: int, model: Path, folder: Path) -> list[str]:
    """Pieces that make no difference."""
    idle = []
    for name, (changes, pieces) in PIECES.items():
        place = folder / name
        given: list[Any] = []
        trainer, config, _ = trainer_of(model, changes)
        for step in (1, 2):
            step_of(trainer, step, False)
        trainer.take_snapshot(2, given.append)
        wanted = end_of(trainer, 3, False)
        write(place, given[0], config, 2)
        for number, piece in enumerate(pieces):
            copy = folder / f"{name} {number}"
            altered(place, copy, piece)
            trainer, _, _ = trainer_of(model, {**changes, "resume": str(copy)})
            if end_of(trainer, 3, False) == wanted:
                idle.append(f"{name}: {piece}")
    return idle


@pytest.mark.processes
def test_each_piece_makes_a_difference(model: Path, tmp_path: Path) -> None:
    assert run_ranks(without_each, 1, model, tmp_path) == [[]]


def slowly(rank: int, model: Path) -> list[bool]:
    """Whether a snapshot that takes longer than a step is what is written at once."""
    on_host = state.Piece.on_host

    def slow(piece: state.Piece, *, copy: bool = False) -> state.Piece:
        if threading.current_thread().name == "snapshot":
            time.sleep(0.003)
        return on_host(piece, copy=copy)

    found = []
    for changes in ({}, {"distro": True, **BF16}):
        ends = []
        for beside in (True, False):
            given: list[Any] = []
            trainer, _, _ = trainer_of(model, changes)
            for step in (1, 2):
                step_of(trainer, step, False)
            if beside:
                trainer.take_snapshot(2, given.append)
                with mock.patch.object(state.Piece, "on_host", slow):
                    step_of(trainer, 3, False)
            else:
                trainer.plain()
                given.append(trainer.files())
            ends.append(digest(given[0]))
        found.append(ends[0] == ends[1])
    return found


@pytest.mark.processes
def test_nothing_changes_until_it_is_copied(model: Path) -> None:
    assert run_ranks(slowly, 1, model) == [[True, True]]


def parted(rank: int, model: Path) -> str:
    """What a snapshot of replicas that have parted says."""
    given: list[Any] = []
    trainer, _, _ = trainer_of(model, {**DISTRO, "replicas": 2, "check_every": 1000})
    step_of(trainer, 1, False)
    if rank == 1:
        trainer.plain()
        with torch.no_grad():
            trainer.parameters["lm_head.weight"][3, 4] += 1
    trainer.take_snapshot(1, given.append)
    try:
        step_of(trainer, 2, False)
    except ReplicasDiffer as error:
        assert given == [], "nothing is worth writing"
        return str(error)
    return ""


@pytest.mark.processes
def test_replicas_that_have_parted_are_not_saved(model: Path) -> None:
    said = run_ranks(parted, 2, model)
    assert (
        said
        == ["step 1: replicas are no longer bit-identical in 1 of 21 parameters: lm_head.weight"]
        * 2
    )
