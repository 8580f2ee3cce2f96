"""`psyche-fast train` with AdamW on one rank against a plain PyTorch loop, step by step in turns.

    python benchmarks/bench_train_step.py        # prints the comparison; --out FILE writes JSON
    make bench                                   # the same under pytest

Same model, same batches, same AdamW, in one process. Ours is all that a step of `train` is: the
batch from the prefetcher, the operation through the store, forward and backward, the counts'
all-reduce, AdamW, and the line in metrics.jsonl. The plain loop is what a
tutorial has. What the rest of the machine does meanwhile disturbs both alike. The figures count
only if both arrive at the same losses.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import transformers

from benchmarks.common import environment, percentiles
from psyche_fast.config import RunConfig, optimizer_to_json
from psyche_fast.core.loop import StepLoop
from psyche_fast.core.plan import make_plan
from psyche_fast.data import BatchPrefetcher
from psyche_fast.metrics import MetricsWriter, PhaseTimer
from psyche_fast.psyche import messages
from psyche_fast.psyche.store import CoreStore
from psyche_fast.rank import serve as runtime
from psyche_fast.start.network import listen

WARMUP = 3
LENGTH = 128
ROWS = 16


def prepare(folder: Path, steps: int) -> RunConfig:
    """A small Llama, random tokens, and the run on them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2048, (steps * ROWS + 1) * LENGTH, dtype=np.uint16)
    tokens.tofile(folder / "data" / "tokens.bin")
    return RunConfig(
        model=str(folder / "model"), data_path=str(folder / "data"), sequence_length=LENGTH,
        micro_batch=ROWS, total_batch=ROWS, total_steps=steps, warmup_steps=0,
        learning_rate=1e-3, param_dtype="float32", device="cpu", output=str(folder / "run"),
    )  # fmt: skip


def compare(steps: int = 30) -> dict[str, Any]:
    """Runs both loops in turns; milliseconds per step at p20, p50, p80, and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, steps)
        plan = make_plan(config)
        device = torch.device("cpu")
        store = CoreStore(listen("127.0.0.1", 0), 1, timedelta(seconds=60))
        runtime.join("gloo", store.store, 1, 0, device, timedelta(seconds=60))
        try:
            return _turns(config, plan, store, device, folder, steps)
        finally:
            dist.destroy_process_group()


def _turns(
    config: RunConfig, plan: Any, store: CoreStore, device: torch.device, folder: Path, steps: int
) -> dict[str, Any]:
    model, topology = runtime.load("HfAuto", plan.source, 1, 1, plan.settings, device)
    operation = messages.Hyperparameters(
        lr_scheduler=config.lr_scheduler(), optimizer=optimizer_to_json(config.optimizer()),
        micro_batch_size=ROWS, grad_accum_in_fp32=False,
    )  # fmt: skip
    trainer = runtime.build_trainer(model, topology, operation, plan.settings)

    plain = transformers.AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = torch.optim.AdamW(
        plain.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    tokens = np.fromfile(folder / "data" / "tokens.bin", dtype=np.uint16).astype(np.int64)
    tokens = torch.from_numpy(tokens)

    def plain_step(step: int) -> None:
        ids = tokens[(step - 1) * ROWS * LENGTH : step * ROWS * LENGTH].view(ROWS, LENGTH)
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(step)
        loss = plain(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses["plain"].append(loss.item())

    times: dict[str, list[float]] = {"plain": [], "psyche_fast": []}
    losses: dict[str, list[float]] = {"plain": [], "psyche_fast": []}

    def report(line: dict[str, Any]) -> None:
        losses["psyche_fast"].append(line["loss"])
        writer.write(line)

    with (
        MetricsWriter(folder / "metrics.jsonl") as writer,
        BatchPrefetcher(plan.dataset, ROWS, 1, steps) as batches,
    ):
        loop = StepLoop(
            config, store, trainer, batches, report,
            device=device, timer=PhaseTimer(), side_files=[],
        )  # fmt: skip

        def our_step(step: int) -> None:
            loop.step(step, saves=False, last=step == steps)

        for step in range(1, steps + 1):
            turns = [("plain", plain_step), ("psyche_fast", our_step)]
            for name, run in turns if step % 2 else reversed(turns):
                began = time.perf_counter()
                run(step)
                times[name].append(1e3 * (time.perf_counter() - began))
        loop.finish()
    worst = max(abs(a - b) for a, b in zip(losses["plain"], losses["psyche_fast"], strict=True))
    if worst > 1e-3:
        raise AssertionError(f"no figures: the losses differ by {worst}")
    result: dict[str, Any] = {name: percentiles(values[WARMUP:]) for name, values in times.items()}
    # Neighbouring steps saw the same machine: the median of their ratios is the steadier figure.
    pairs = zip(times["psyche_fast"][WARMUP:], times["plain"][WARMUP:], strict=True)
    result["ratio"] = percentiles([a / b for a, b in pairs])
    result["largest_loss_difference"] = worst
    result["shape"] = f"Llama, 3.1M parameters, {ROWS} x {LENGTH} tokens per step, fp32"
    return result


def test_train_costs_at_most_five_percent_more() -> None:
    result = compare()
    print(json.dumps(result))
    assert result["ratio"]["p50"] <= 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    result = {"environment": environment(), **compare(args.steps)}
    for name in ("plain", "psyche_fast"):
        p = result[name]
        print(f"{name:12} {p['p50']:8.2f} ms per step  (p20 {p['p20']:.2f}, p80 {p['p80']:.2f})")
    p = result["ratio"]
    print(f"{'ratio':12} {p['p50']:8.3f}              (p20 {p['p20']:.3f}, p80 {p['p80']:.3f})")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
