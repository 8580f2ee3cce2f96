"""FSDP2, tensor parallelism and both, in real processes over gloo, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.parallel import blocks
from psyche_fast.models.source import read_config, resolve_model
from tests.groups import run_ranks
from tests.models.conftest import TINY

STEPS = 4
# Documents in one row, and in the second step rows that no loss counts: with two FSDP ranks, all
# of the second one's.
LENGTHS = [[16], [5, 11], [16], [3, 6, 7]]


def batches() -> list[Batch]:
    ids = torch.randint(3, 64, (2, 4, 16), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, 1, 4:9] = -100
    labels[1, 2:] = -100
    pair = [Batch(ids[0], labels[0], None, LENGTHS), Batch(ids[1], labels[1])]
    return pair * (STEPS // 2)


def train(model: CausalLM, dp: int = 1, index: int = 0) -> list[torch.Tensor]:
    """Losses over a few steps of AdamW: this rank's addends of each."""
    # foreach and fused AdamW take no mixture of plain and distributed tensors.
    optimizer = torch.optim.AdamW(model.named_parameters().values(), lr=1e-2, foreach=False)
    losses = []
    model.train()
    for batch in batches():
        batch = model.prepare(batch)
        mine = batch.share(index, dp)
        share = sum(mine.real_tokens()) / sum(batch.real_tokens())
        loss = model.loss(mine)
        (loss * share * dp).backward()  # FSDP2 averages over its ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss * share).detach())
    return losses


def load(folder: Path, **kwargs: Any) -> CausalLM:
    """This process's part in fp32, with the attention that `auto` takes on the CPU."""
    source = resolve_model(str(folder))
    return load_model(
        source,
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        attn_implementation=choose_attention("auto", "cpu", read_config(source)["model_type"]),
        **kwargs,
    )


def worker(rank: int, folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Three layouts of four ranks for each of the models: what rank 0 saw."""
    meshes = {
        "fsdp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
        "tp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "tensor")),
        "fsdp+tp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor")),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, layout in CASES:
        mesh = meshes[layout]
        shard_mesh = mesh["shard"] if "fsdp" in layout else None
        model = load(
            folders[name],
            shard_mesh=shard_mesh,
            tensor_mesh=mesh["tensor"] if "tp" in layout else None,
            group=dist.group.WORLD if layout == "fsdp+tp" else None,
            activation_checkpointing=layout == "fsdp+tp",
        )
        loaded = {k: t for k, t in model.full_state_dict_iter() if t is not None}
        dp = 1 if shard_mesh is None else 2
        index = 0 if shard_mesh is None else shard_mesh.get_local_rank()
        losses = torch.stack(train(model, dp, index))
        if shard_mesh is not None:
            dist.all_reduce(losses, group=shard_mesh.get_group())
        trained = {k: t for k, t in model.full_state_dict_iter() if t is not None}
        assert model.is_root == bool(loaded) == bool(trained)
        params = model.named_parameters().values()
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in params]
        found[f"{name}-{layout}"] = {
            "loaded": loaded,
            "trained": trained,
            "losses": losses,
            "local": sum(p.numel() for p in parts),
            "total": sum(p.numel() for p in params),
        }
    return found


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    # Halves of 33 and 25 rows, which FSDP2 cuts unevenly again.
    "untied": ("llama", {"vocab_size": 66, "intermediate_size": 50}),
    # Norms of queries and keys see only a rank's own heads.
    "qwen3": ("qwen3", {"head_dim": 8}),
    # Projections gathered and split again around a norm over all heads.
    "olmo2": ("olmo2", {}),
    # Experts that the checkpoint holds one by one; odd sizes that two ranks do not divide.
    "experts": ("mixtral", {"num_local_experts": 3, "vocab_size": 67}),
    # Experts divided among the ranks, attention over latent keys, a dense layer before.
    "latent": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "tie_word_embeddings": False,
        },
    ),
    # A parameter beside the projections: a number for each head.
    "sinks": ("granite_swa", {"sliding_window": 8}),
}
NO_TP = ["experts"]
OF_TP = ["qwen3", "olmo2", "sinks"]  # to FSDP2 they are like any other
CASES = [
    (name, layout)
    for name in MODELS
    for layout in ("fsdp", "tp", "fsdp+tp")
    if name not in (OF_TP if layout == "fsdp" else NO_TP)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("parallel")
    for name, (model_type, config) in MODELS.items():
        torch.manual_seed(0)
        settings = AutoConfig.for_model(model_type, **{**TINY, **config})
        model = AutoModelForCausalLM.from_config(settings)
        model.save_pretrained(folder / name, max_shard_size="30KB")
    return {name: folder / name for name in MODELS}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What the four processes saw; they run once for all tests here."""
    return run_ranks(worker, 4, folders)[0]


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Losses and trained parameters of each model in one process."""
    models = {name: load(folder) for name, folder in folders.items()}
    losses = {name: torch.stack(train(model)) for name, model in models.items()}
    return {name: (losses[name], dict(m.full_state_dict_iter())) for name, m in models.items()}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_losses_and_parameters_are_those_of_one_process(
    runs, alone, name: str, layout: str
) -> None:
    expected, wanted = alone[name]
    found = runs[f"{name}-{layout}"]
    assert (expected[2:] - expected[:2]).abs().min() > 0.03, "the optimiser counts"
    torch.testing.assert_close(found["losses"], expected, rtol=0, atol=1e-4)
    assert found["trained"].keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found["trained"][key], tensor, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_was_loaded_comes_back_bit_for_bit(runs, folders, name: str, layout: str) -> None:
    loaded = runs[f"{name}-{layout}"]["loaded"]
    files = {k: t for f in folders[name].glob("*.safetensors") for k, t in load_file(f).items()}
    assert loaded.keys() == files.keys()
    for key, tensor in files.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_rank_holds_its_part_only(runs, name: str, layout: str) -> None:
    sizes = runs[f"{name}-{layout}"]
    parts = 4 if layout == "fsdp+tp" else 2
    # Norms, routers and latent projections stay whole under tensor parallelism, older plans leave
    # the embedding whole too, and the first of two ranks has two of three experts.
    assert sizes["local"] < 1.32 * sizes["total"] / parts


def _plan(folder: Path, size: int, **kwargs: Any) -> None:
    """Loads rank 0's part of `size`-way tensor parallelism, without the other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
        load_model(
            resolve_model(str(folder)), device=torch.device("cpu"), tensor_mesh=mesh, **kwargs
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("model_type", "config", "size", "says"),
    [
        ("llama", {}, 4, "4 does not divide num_key_value_heads 2"),
        ("llama", {"num_key_value_heads": 4}, 3, "3 does not divide num_attention_heads 4"),
        ("llama", {"vocab_size": 67}, 2, "2 does not divide .*, 67"),
        ("llama", {"intermediate_size": 49}, 2, "2 does not divide .*gate_proj's outputs, 49"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, 2, "GPT2LMHeadModel"),
        ("mixtral", {"num_local_experts": 3}, 2, "2 does not divide .*experts, 3"),
        (
            "llama4_text",
            {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
            2,
            "Llama4TextExperts; wanted experts stacked",
        ),
    ],
)
def test_what_does_not_divide_is_named(save_model, model_type, config, size, says) -> None:
    with pytest.raises(ValueError, match=f"--tensor-parallelism.*{says}"):
        _plan(save_model(model_type, **config), size)


def test_blocks_are_the_transformers_layers(save_model) -> None:
    assert list(blocks(load(save_model()).module)) == ["model.layers.0", "model.layers.1"]


def test_blocks_of_own_modules() -> None:
    own = torch.nn.Module()
    own.stack = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    own.head = torch.nn.Linear(2, 3)
    assert list(blocks(own)) == ["stack.0", "stack.1"]
    own.fsdp_modules = ["Linear"]
    assert list(blocks(own)) == ["stack.0", "stack.1", "head"]
    own.fsdp_modules = [own.head]
    assert list(blocks(own)) == ["head"]


def test_no_block_is_inside_another_or_shares_what_is_outside() -> None:
    own = torch.nn.Module()
    own.inside = torch.nn.Sequential(torch.nn.Linear(2, 2))
    own.tied = torch.nn.Linear(2, 2)
    own.head = torch.nn.Linear(2, 2)
    own.head.weight = own.tied.weight
    own.fsdp_modules = ["Sequential", "Linear"]
    assert list(blocks(own)) == ["inside"]
    del own.fsdp_modules
    own.lists = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2)])])
    assert list(blocks(own)) == ["lists.0"]
