"""What Psyche's core gets from this project's package `psyche`, against the pattern of its own.

    python benchmarks/bench_psyche.py                   # table; --out FILE writes JSON

Two ranks (gloo processes on this machine) share a Llama by `dp` 2. Rank 0's trainer is the core's,
re-enacted as in the tests; what differs is rank 1 and how both load.

- loading: Psyche's package reads the whole checkpoint on every rank and scatters each tensor from
  rank 0 into the sharded model; ours reads each rank's own part. Peak memory is that of the rank
  that takes most, over what its process had before; pages of mapped files count.
- a step of DisTrO (`train` with the result of the step before, `optimize` with two peers'): with
  Psyche's package every rank transforms and sorts all momentum, ours does so on rank 0 alone. Both
  are trained turn by turn by the same two processes; rank 1's processor time is what it spends.
- start-up: from nothing to an imported package.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, percentiles, write_json
from tests.psyche.rank0 import RustTrainer, signs

ON_PATH = Path(__file__).resolve().parent.parent / "psyche_fast/psyche/on_path"
STEPS, ROWS, LENGTH = 12, 4, 128
OPTIONS = {
    "Distro": {
        "clip_grad_norm": 1.0, "weight_decay": 0.1, "compression_decay": 0.999,
        "compression_topk": 4, "compression_chunk": 64, "quantize_1bit": True,
    }
}  # fmt: skip


def save_model(folder: Path, width: int, layers: int) -> int:
    """A Llama; returns the number of its parameters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=width * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def load_ours(folder: Path) -> Any:
    """A model as the core gets it from our package."""
    psyche = importlib.import_module("psyche")
    source = psyche.PretrainedSourceRepoFiles([str(f) for f in sorted(folder.iterdir())])
    return psyche.make_causal_lm(
        "HfAuto", source, "cpu", "sdpa", 2, 1, LENGTH, param_dtype=torch.float32
    )


def load_by_scatters(folder: Path) -> Any:
    """A model with the pattern of Psyche's own package."""
    import transformers

    tensors = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config)
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    for name, own in model.state_dict().items():
        assert isinstance(own, DTensor)
        own.copy_(distribute_tensor(tensors[name], own.device_mesh, own.placements))
    return model


def measure_loading(rank: int, store: str, folder: Path, how: str, out: Path) -> None:
    """Time and peak memory of a process that loads once."""
    join(rank, store)
    import transformers.models.llama.modeling_llama  # noqa: F401 - which is not loading

    importlib.import_module("psyche")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    started = time.perf_counter()
    model = {"ours": load_ours, "scatters": load_by_scatters}[how](folder)
    dist.barrier()
    seconds = time.perf_counter() - started
    peak = torch.tensor(peak_bytes() - before)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    assert model is not None
    if rank == 1:
        out.write_text(json.dumps({"seconds": seconds, "peak_bytes": int(peak)}))
    dist.barrier()
    os._exit(0)


def peak_bytes() -> int:
    """The most memory that this process has held, mapped files among it (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_steps(rank: int, store: str, folder: Path, out: Path) -> None:
    """Steps of two models turn by turn: the further rank by the core's trainer, and by ours."""
    join(rank, store)
    psyche = importlib.import_module("psyche")
    kinds = ("every rank compresses", "ours")
    size, lr = ROWS, 4e-4
    schedule = {"Constant": {"base_lr": lr, "warmup_init_lr": 0.0, "warmup_steps": 0}}
    trainers: dict[str, Any] = {}
    for kind in kinds:
        model = load_ours(folder)
        if rank == 1 and kind == "ours":
            texts = json.dumps(schedule), json.dumps(OPTIONS), "{}"
            trainers[kind] = psyche.Trainer(0, model, *texts, size, False)
        else:
            trainers[kind] = RustTrainer(model, OPTIONS, size, lr, can_clip=True)
    times: dict[str, dict[str, list[float]]] = {k: {"wall": [], "processor": []} for k in kinds}
    own: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for step in range(1, STEPS + 1):
        torch.manual_seed(step)
        ids = torch.randint(0, 8192, (ROWS, LENGTH))
        for kind in kinds if step % 2 else kinds[::-1]:
            own[kind] = share(own[kind], rank)
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            found = take_step(trainers[kind], step, ids, own[kind])
            processor = time.process_time() - processor
            dist.barrier()
            if step > 2:
                times[kind]["wall"].append(time.perf_counter() - wall)
                times[kind]["processor"].append(processor)
            own[kind] = [found]
    if rank == 1:
        out.write_text(json.dumps(times))
    dist.barrier()
    os._exit(0)


def share(results: list[Any], rank: int) -> list[Any]:
    """Rank 0's results on both ranks, outside of what is measured."""
    box = [results if rank == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def take_step(trainer: Any, step: int, ids: torch.Tensor, own: list[Any]) -> Any:
    """`train` and `optimize`; what `train` gave."""
    if isinstance(trainer, RustTrainer):
        _, found = trainer.train(step, [ids, None, None, None], own, False, None, None)
        trainer.optimize(step, [signs(r) for r in own] * 2, None)
        return found
    psyche = importlib.import_module("psyche")

    def of(results: list[Any]) -> list[Any]:
        return [
            [psyche.DistroResult(r["idx"], r["val"], r["xshape"], r["totalk"]) for r in result]
            for result in results
        ]

    trainer.train(step, False, (0, 0), ids, None, None, None, None, of(own))
    trainer.optimize(step, None, of([signs(r) for r in own] * 2))
    return None


def join(rank: int, store: str) -> None:
    """One of two ranks."""
    sys.path.insert(0, str(ON_PATH))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def run(function: Callable[..., None], folder: Path, *args: Any) -> Any:
    """What rank 1 of two fresh processes has written."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out")
        mp.spawn(function, (str(Path(place, "store")), folder, *args, out), nprocs=2)
        return json.loads(out.read_text())


def start_up() -> list[float]:
    """Seconds until the package has been imported, in a Python of its own."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "import psyche.dtensor_helpers, psyche_fast.psyche.serving"],
            check=True,
            env={**os.environ, "PYTHONPATH": f"{ON_PATH}:{os.environ.get('PYTHONPATH', '')}"},
        )
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        large, small = folder / "large", folder / "small"
        parameters = save_model(large, 1024, 12), save_model(small, 512, 4)
        loads: dict[str, list[dict[str, float]]] = {"ours": [], "scatters": []}
        for turn in range(3):
            for how in list(loads)[:: 1 if turn % 2 else -1]:
                loads[how].append(run(measure_loading, large, how))
        steps = run(measure_steps, small)
    found = {
        "parameters": dict(zip(("loading", "step"), parameters, strict=True)),
        "start_up_s": percentiles(start_up()),
        "loading_s": {k: percentiles([x["seconds"] for x in v]) for k, v in loads.items()},
        "loading_peak_bytes": {k: max(x["peak_bytes"] for x in v) for k, v in loads.items()},
        "step_s": {k: percentiles(v["wall"]) for k, v in steps.items()},
        "processor_s_of_rank_1": {k: percentiles(v["processor"]) for k, v in steps.items()},
    }
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, {"environment": environment(), **found})


if __name__ == "__main__":
    main()
