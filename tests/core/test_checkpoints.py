"""What checkpoints are called, which are kept, and that Psyche's and ours are each other's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psyche_fast.config import Run, RunConfig
from psyche_fast.core.checkpoints import checkpoint_name, prune
from psyche_fast.models import load_model
from psyche_fast.models.building import tied_names
from psyche_fast.models.loading import check_fit
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.checkpoint import save_model, under_all_names
from tests.tiny import save_llama

CPU = torch.device("cpu")


def folder(parent: Path, name: str, *, complete: bool = True) -> Path:
    path = parent / name
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if complete:
        (path / "model.safetensors").write_bytes(b"")
    return path


@pytest.mark.parametrize("run_id", [None, "consilience.40b"])
@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, {2, 4, 6, 10}), (1, {10}), (2, {6, 10}), (3, {4, 6, 10}), (9, {2, 4, 6, 10})],
)
def test_the_newest_are_kept(tmp_path: Path, run_id: str | None, keep: int, left: set[int]) -> None:
    paths = {step: folder(tmp_path, checkpoint_name(step, run_id)) for step in (2, 4, 6, 10)}
    removed = prune(paths[10], 10, Run(run_id=run_id, keep=keep), set())
    assert {step for step, path in paths.items() if path.exists()} == left
    assert sorted(removed) == sorted(path for step, path in paths.items() if step not in left)
    assert len(list(tmp_path.iterdir())) == len(left)


def test_those_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    paths = {step: folder(tmp_path, checkpoint_name(step, None)) for step in (2, 4, 6, 8, 10)}
    prune(paths[10], 10, Run(keep=2, keep_every=4), set())
    assert {step for step, path in paths.items() if path.exists()} == {4, 8, 10}
    with pytest.raises(ValueError, match="--keep-every needs --keep"):
        Run(keep_every=4)


def test_what_is_not_a_complete_checkpoint_of_this_run_is_not_touched(tmp_path: Path) -> None:
    """Nor counted: with it gone, the two newest of ours stay."""
    others = [
        folder(tmp_path, "step-000005", complete=False),  # no weights
        folder(tmp_path, "step-000020"),  # of a part of the run that was gone back behind
        folder(tmp_path, "step-3"), folder(tmp_path, "step-000003-best"),
        folder(tmp_path, "mine-step3"), folder(tmp_path, ".step-000003.tmp-1"),
        folder(tmp_path, "notes"),
    ]  # fmt: skip
    (tmp_path / "step-000004").symlink_to(folder(tmp_path.parent / "elsewhere", "real"))
    (tmp_path / "step-000007").write_text("a file")
    shard = folder(tmp_path, "step-000006", complete=False)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (shard / "model.safetensors.index.json").write_text(json.dumps(index))
    others += [shard, tmp_path / "step-000004" / "config.json", tmp_path / "step-000007"]
    uploading, older, old, newest = (folder(tmp_path, f"step-{n:06}") for n in (1, 2, 8, 9))
    assert prune(newest, 9, Run(keep=2), {uploading.resolve()}) == [older]
    assert all(path.exists() for path in (*others, uploading, old, newest))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "-a", "a b", "x" * 65, "a\n"])
def test_a_run_id_is_a_folders_name(name: str) -> None:
    with pytest.raises(ValueError, match="--run-id: wanted up to 64"):
        RunConfig.of(run_id=name)


def psyches_checkpoint(run: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    """As its client writes one: bf16, names ascending, shards, an index on one line."""
    path = run / f"my-run-step{step}"
    path.mkdir(parents=True)
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(
            {name: tensors[name].to(torch.bfloat16) for name in part}, path / file,
            metadata={"format": "pt"},
        )  # fmt: skip
        weight_map.update(dict.fromkeys(part, file))
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, separators=(",", ":")))
    return path


def test_psyches_checkpoints_load(tmp_path: Path) -> None:
    origin = save_llama(tmp_path / "origin")
    model = transformers.AutoModelForCausalLM.from_pretrained(origin)
    named = {name: p.detach() for name, p in model.named_parameters()}
    path = psyches_checkpoint(tmp_path / "run", 41, named)
    # What it copies beside: the configuration is that of the model the run began with, fp32.
    for name in ("config.json", "generation_config.json"):
        (path / name).write_bytes((origin / name).read_bytes())
    source = resolve_model(str(path))
    check_fit(source)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = load_model(source, device=CPU, param_dtype=dtype)
        for name, parameter in loaded.named_parameters().items():
            assert torch.equal(parameter, named[name].bfloat16().to(dtype)), name
    assert [file.name for file in source.side_files] == ["generation_config.json"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ours_have_what_psyche_wants(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Every name of the model's state, tied ones too, whose absence is an error there."""
    origin = save_llama(tmp_path / "origin", tie_word_embeddings=tied)
    source = resolve_model(str(origin))
    model = load_model(source, device=CPU, param_dtype=dtype)
    path = tmp_path / "run" / checkpoint_name(41, "my-run")
    tensors = under_all_names(model.full_state_dict_iter(), tied_names(model.module))
    save_model(path, model, tensors, source.side_files)
    assert path.name == "my-run-step41"
    wanted = transformers.AutoModelForCausalLM.from_pretrained(origin).state_dict()
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert "lm_head.weight" in saved
    assert all(torch.equal(saved[name], wanted[name].to(dtype)) for name in wanted)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = load_model(resolve_model(str(path)), device=CPU, param_dtype=dtype)
    assert {n: p.shape for n, p in again.named_parameters().items()} == {
        n: p.shape for n, p in model.named_parameters().items()
    }
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    assert all(torch.equal(t, wanted[n].to(dtype)) for n, t in plain.state_dict().items())
    names = [name for name, _ in model.full_state_dict_iter()]
    assert ("lm_head.weight" in names) != tied, "otherwise once, as Transformers has it"
