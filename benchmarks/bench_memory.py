"""What a loss without logits and fp32 masters take and save: a step's peak memory and time.

    python benchmarks/bench_memory.py        # prints the table; --out FILE writes JSON
    make bench                               # the same under pytest

Each case is a process of its own, since a peak of the allocator's stays; the cases of a pair run in
turns. Memory is what forward, backward and step hold beside the model and the optimiser's state at
most ("step") and these themselves ("kept"): of the process's resident set on a CPU, of the
allocator's on a GPU. The losses of a pair have to agree, or there are no figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from benchmarks.common import device_here, environment
from psyche_fast import config
from psyche_fast.batch import Batch
from psyche_fast.models import load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.optimizers import make_optimizer
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, trainable
from psyche_fast.schedules import Constant

ROUNDS = 2
STEPS = 3
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "loss, vocabulary 131072, fp32": ({"loss": "plain"}, {"loss": "chunked"}),
    "loss, vocabulary 131072, bf16": (
        {"loss": "plain", "param": "bfloat16"},
        {"loss": "chunked", "param": "bfloat16"},
    ),
    "AdamW, bf16 parameters": (
        {"param": "bfloat16", "vocabulary": 4096, "layers": 8},
        {"param": "bfloat16", "vocabulary": 4096, "layers": 8, "master": "float32"},
    ),
    "DisTrO, bf16 parameters": (
        {"param": "bfloat16", "vocabulary": 4096, "layers": 8, "distro": True},
        {"param": "bfloat16", "vocabulary": 4096, "layers": 8, "distro": True, "master": "float32"},
    ),
}
TINY = {"vocabulary": 8192, "layers": 1, "length": 128}


class Peak:
    """Bytes that are held: `now()`, and at most while it watches."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._done, self.most = device, threading.Event(), 0

    def now(self) -> int:
        """Bytes held at the moment."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if self._device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self._device)

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, self.now())


def case(options: dict[str, Any]) -> dict[str, Any]:
    """Some steps of a small Llama in this process."""
    torch.set_num_threads(1)
    device, length = device_here(), options.get("length", 512)
    peak, folder = Peak(device), Path(tempfile.mkdtemp())
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=options.get("vocabulary", 131072), hidden_size=256, intermediate_size=688,
            num_hidden_layers=options.get("layers", 2), num_attention_heads=4,
            max_position_embeddings=length, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    before = peak.now()
    model = load_model(
        resolve_model(str(folder)), device=device,
        param_dtype=getattr(torch, options.get("param", "float32")),
        master_dtype=getattr(torch, options.get("master", "bfloat16")),
        loss=options.get("loss", "plain"),
    )  # fmt: skip
    parameters = trainable(model)
    choice = config.Optimizer(distro=options.get("distro", False))
    optimizer = make_optimizer(choice, parameters, None, model.masters)
    schedule = Constant(base_lr=1e-4, warmup_init_lr=0.0, warmup_steps=0)
    trainer = Trainer(
        model, Topology(), schedule, optimizer, config.Training(micro_batch=4, check_every=0), 1.0
    )
    rows = torch.randint(0, 4096, (4, length), generator=torch.Generator().manual_seed(0))
    times, losses = [], []
    most = 0
    for step in range(1, STEPS + 2):
        began, kept = time.perf_counter(), peak.now()
        with Peak(device) as watch:
            output = trainer.train(step, Batch(rows))
            trainer.optimize(step)
            losses.append(float(output.loss))
        if step > 1:  # the first one allocates the optimiser's state
            times.append(time.perf_counter() - began)
            most = max(most, watch.most - kept)
    return {
        "ms": [1e3 * t for t in times], "step_mb": most / 1e6,
        "kept_mb": (peak.now() - before) / 1e6, "losses": losses,
        "parameters": sum(p.numel() for p in parameters.values()),
    }  # fmt: skip


def _in_process(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{options}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(rounds: int = ROUNDS, **changes: Any) -> dict[str, Any]:
    """Every pair: milliseconds (median), megabytes, and the second case's over the first's."""
    results: dict[str, Any] = {}
    for name, pair in PAIRS.items():
        runs: list[list[dict[str, Any]]] = [[], []]
        for turn in range(rounds):
            for at in (0, 1) if turn % 2 == 0 else (1, 0):
                runs[at].append(_in_process({**pair[at], **changes}))
        losses = [own[0]["losses"] for own in runs]
        worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
        if worst > 0.05:
            raise AssertionError(f"{name}: no figures, the losses differ by {worst}")
        figures = [
            {
                "options": {**pair[at], **changes},
                "ms": statistics.median(ms for run in own for ms in run["ms"]),
                "step_mb": max(run["step_mb"] for run in own),
                "kept_mb": max(run["kept_mb"] for run in own),
                "bytes_per_parameter": 1e6 * max(r["kept_mb"] for r in own) / own[0]["parameters"],
            }
            for at, own in enumerate(runs)
        ]
        ratios = {key: figures[1][key] / figures[0][key] for key in ("ms", "step_mb", "kept_mb")}
        results[name] = {"cases": figures, "ratios": ratios, "largest_loss_difference": worst}
    return results


def test_pairs_agree_and_chunks_save_memory() -> None:
    result = compare(rounds=1)
    print(json.dumps(result))
    for name in list(PAIRS)[:2]:
        ratios = result[name]["ratios"]
        assert ratios["step_mb"] <= 0.4
        assert ratios["ms"] <= 1.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="small shapes: that it runs")
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(json.loads(args.case))))
        return
    result = compare(**({"rounds": 1, **TINY} if args.tiny else {}))
    for name, pair in result.items():
        for figures in pair["cases"]:
            print(
                f"{name:32} {figures['ms']:9.1f} ms {figures['step_mb']:9.1f} MB in a step "
                f"{figures['kept_mb']:9.1f} MB kept  {figures['options']}"
            )
        print(f"{'':32} " + "  ".join(f"{key} x {r:.2f}" for key, r in pair["ratios"].items()))
    if args.out:
        args.out.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
