"""FSDP2, tensor parallelism and both, in real processes over gloo, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.parallel import blocks
from psyche_fast.models.source import read_config, resolve_model

STEPS = 4
pytestmark = pytest.mark.timeout(300)  # four processes that import torch and transformers
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


def load(folder: str, **kwargs: Any) -> CausalLM:
    """This process's part in fp32, with the attention that ``auto`` takes on the CPU."""
    source = resolve_model(folder)
    return load_model(
        source,
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        attn_implementation=choose_attention("auto", "cpu", read_config(source)["model_type"]),
        **kwargs,
    )


def worker() -> None:
    """Runs in each process: three layouts of four ranks, for each of the models."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    job = json.loads(os.environ["JOB"])
    store = f"file://{job['out']}/store"
    dist.init_process_group("gloo", init_method=store, rank=job["rank"], world_size=4)
    meshes = {
        "fsdp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
        "tp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "tensor")),
        "fsdp+tp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor")),
    }
    report: dict[str, Any] = {}
    for name, folder in job["models"].items():
        for layout, mesh in meshes.items():
            if layout != "fsdp" and name in job["no_tp"]:
                continue
            shard_mesh = mesh["shard"] if "fsdp" in layout else None
            tensor_mesh = mesh["tensor"] if "tp" in layout else None
            model = load(
                folder,
                shard_mesh=shard_mesh,
                tensor_mesh=tensor_mesh,
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
            params = model.named_parameters().values()
            if dist.get_rank() == 0:
                key = f"{name}-{layout}"
                save_file(loaded, f"{job['out']}/{key}-loaded.safetensors")
                save_file(trained, f"{job['out']}/{key}-trained.safetensors")
                report[key] = {
                    "losses": losses.tolist(),
                    "local": sum(
                        (p.to_local() if isinstance(p, DTensor) else p).numel() for p in params
                    ),
                    "total": sum(p.numel() for p in params),
                }
            assert model.is_root == bool(loaded) == bool(trained)
    if dist.get_rank() == 0:
        Path(job["out"], "report.json").write_text(json.dumps(report))
    dist.destroy_process_group()


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
CASES = [
    (name, layout)
    for name in MODELS
    for layout in ("fsdp", "tp", "fsdp+tp")
    if layout == "fsdp" or name not in NO_TP
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path, dict[str, Any]]:
    """Runs the four processes once for all tests here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("parallel")
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    saved = {}
    for name, (model_type, config) in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **{**tiny, **config})
        )
        saved[name] = folder / name
        model.save_pretrained(saved[name], max_shard_size="30KB")
    job = {"models": {k: str(v) for k, v in saved.items()}, "no_tp": NO_TP, "out": str(folder)}
    paths = [str(Path(__file__).parent), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import test_parallel; test_parallel.worker()"],
            env={**env, "JOB": json.dumps({**job, "rank": rank})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank}:\n{outputs[rank][-4000:]}"
    return saved, folder, json.loads((folder / "report.json").read_text())


def _single(folder: Path) -> CausalLM:
    return load(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_losses_and_parameters_are_those_of_one_process(runs, name: str, layout: str) -> None:
    saved, out, report = runs
    single = _single(saved[name])
    expected = torch.stack(train(single))
    losses = torch.tensor(report[f"{name}-{layout}"]["losses"])
    assert (expected[2:] - expected[:2]).abs().min() > 0.03, "the optimiser counts"
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    trained = load_file(out / f"{name}-{layout}-trained.safetensors")
    wanted = dict(single.full_state_dict_iter())
    assert trained.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_what_was_loaded_comes_back_bit_for_bit(runs, name: str, layout: str) -> None:
    saved, out, _ = runs
    loaded = load_file(out / f"{name}-{layout}-loaded.safetensors")
    files = {k: t for f in saved[name].glob("*.safetensors") for k, t in load_file(f).items()}
    assert loaded.keys() == files.keys()
    for key, tensor in files.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_rank_holds_its_part_only(runs, name: str, layout: str) -> None:
    _, _, report = runs
    sizes = report[f"{name}-{layout}"]
    parts = 4 if layout == "fsdp+tp" else 2
    # Norms, routers and latent projections stay whole under tensor parallelism, older plans leave
    # the embedding whole too, and the first of two ranks has two of three experts.
    assert sizes["local"] < 1.32 * sizes["total"] / parts


def _plan(folder: Path, size: int, **kwargs: Any) -> None:
    """Loads rank 0's part of `size`-way tensor parallelism, without the other ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # The checks between ranks that conftest.py asks for want ranks.
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor",))
        load_model(
            resolve_model(str(folder)), device=torch.device("cpu"), tensor_mesh=mesh, **kwargs
        )
    finally:
        dist.set_debug_level(level)
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
    assert list(blocks(_single(save_model()).module)) == ["model.layers.0", "model.layers.1"]


def test_blocks_of_own_modules() -> None:
    own = torch.nn.Module()
    own.stack = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    own.head = torch.nn.Linear(2, 3)
    assert list(blocks(own)) == ["stack.0", "stack.1"]
    own.fsdp_modules = ["Linear"]
    assert list(blocks(own)) == ["stack.0", "stack.1", "head"]
    own.fsdp_modules = [own.head]
    assert list(blocks(own)) == ["head"]
