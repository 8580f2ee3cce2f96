"""What a rank holds while it loads, and while the model is gathered: host memory, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from psyche_fast.distro import exchange
from psyche_fast.models import load_model
from psyche_fast.models.source import resolve_model
from tests.groups import run_ranks
from tests.memory import SLACK, give_back_at_once, needs_proc, peak

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 8192, "intermediate_size": 2048, "num_hidden_layers": 6}),
    # One tensor of the model is made of 16 (or 8) of the checkpoint's.
    "mixtral": (
        "mixtral",
        {
            "vocab_size": 512, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_local_experts": 8,
        },
    ),
}  # fmt: skip


def measure(rank: int, folder: Path, layout: str) -> dict[str, int]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(layout,))

    def load() -> Any:
        return load_model(
            resolve_model(str(folder)),
            device=torch.device("cpu"),
            param_dtype=torch.float32,
            shard_mesh=mesh if layout == "shard" else None,
            tensor_mesh=mesh if layout == "tensor" else None,
        )

    load()  # imports, caches and thread pools
    give_back_at_once()
    with peak() as loading:
        model = load()
    parameters = model.named_parameters().values()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    dist.barrier()
    with peak() as gathering:
        for _ in model.full_state_dict_iter():
            pass
    return {
        "loading": loading[0],
        "gathering": gathering[0],
        "own": sum(t.nbytes for t in local),
        "largest": max(p.nbytes for p in parameters),
        "block": sum(p.nbytes for n, p in model.named_parameters().items() if ".layers.0." in n),
        "model": sum(p.nbytes for p in parameters),
    }


@pytest.mark.processes
@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("layout", ["shard", "tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_holds_its_part_and_one_tensor_or_bucket(
    tmp_path: Path, name: str, layout: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = MODELS[name]
    settings = AutoConfig.for_model(
        kind, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, **sizes
    )
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path)
    found = run_ranks(measure, 2, tmp_path, layout)
    for rank, bytes_of in enumerate(found):
        assert bytes_of["own"] < 0.6 * bytes_of["model"]
        assert bytes_of["own"] * 0.8 < bytes_of["loading"], "it was measured"
        assert bytes_of["loading"] < bytes_of["own"] + bytes_of["largest"] + SLACK
        # A bucket from each rank arrives at the first one, which makes one tensor at a time of it;
        # where the checkpoint's form is another, one block.
        buckets = 2 * max(exchange.BUCKET_BYTES["cpu"], bytes_of["largest"] // 2)
        whole = bytes_of["block"] if name == "mixtral" else bytes_of["largest"]
        most = (buckets + 2 * whole if rank == 0 else buckets) + SLACK
        assert bytes_of["gathering"] < most
