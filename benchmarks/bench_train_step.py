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
from psyche_fast.config import RunConfig
from psyche_fast.core.evaluation import Evaluation
from psyche_fast.core.plan import Plan, make_plan
from psyche_fast.core.run import Core, steps
from psyche_fast.core.saving import Checkpoints
from psyche_fast.core.watch import Watch
from psyche_fast.data import BatchPrefetcher
from psyche_fast.metrics import Console, MetricsWriter, PhaseTimer
from psyche_fast.rank.beats import Patience
from psyche_fast.rank.protocol import Sender
from psyche_fast.rank.serve import build_trainer
from psyche_fast.rank.topology import join
from psyche_fast.start.network import listen
from psyche_fast.start.signals import StopRequest
from psyche_fast.start.store import host_store

WARMUP = 3
LENGTH = 128
ROWS = 16


def prepare(folder: Path, count: int) -> RunConfig:
    """A small Llama, random tokens, and the run on them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=6, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2048, ((count + 1) * ROWS + 1) * LENGTH, dtype=np.uint16)
    tokens.tofile(folder / "data" / "tokens.bin")
    return RunConfig.of(
        model=str(folder / "model"), data_path=str(folder / "data"), sequence_length=LENGTH,
        micro_batch=ROWS, total_batch=ROWS, warmup_steps=0,
        total_steps=count + 1,  # the last one, which ends with a checkpoint, is not gone through
        learning_rate=1e-3, param_dtype="float32", device="cpu", output=str(folder / "run"),
    )  # fmt: skip


def compare(count: int = 30) -> dict[str, Any]:
    """Runs both loops in turns; milliseconds per step at p20, p50, p80, and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = make_plan(prepare(folder, count))
        seconds = timedelta(seconds=60)
        store = host_store(listen("127.0.0.1", 0), 1, seconds)
        join("gloo", store, 1, 0, torch.device("cpu"), seconds)
        try:
            return _turns(plan, store, folder, count)
        finally:
            dist.destroy_process_group()


def _turns(plan: Plan, store: dist.Store, folder: Path, count: int) -> dict[str, Any]:
    trainer = build_trainer(plan.resolved, plan.source, torch.device("cpu"))
    console = Console(count, 1)
    sender, timer, patience = Sender(store, 1), PhaseTimer(), Patience(60.0)
    core = Core(
        plan, folder, trainer, sender,
        Checkpoints(plan, folder, trainer, sender, store, console.message),
        StopRequest(), console, timer,
        Watch(store, 1, timer, patience, patience, folder, lambda: None),  # which looks on
        Evaluation(plan.held, plan.resolved, trainer, timer, folder, None),  # of nothing
    )  # fmt: skip
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        plan.config.model.model, dtype=torch.float32, attn_implementation="sdpa"
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
        BatchPrefetcher(plan.dataset, plan.config.batch_sizes, 1, count + 1) as batches,
    ):
        ours = steps(core, batches, report)
        for step in range(1, count + 1):
            turns = [("plain", plain_step), ("psyche_fast", lambda step: next(ours))]
            for name, run in turns if step % 2 else reversed(turns):
                began = time.perf_counter()
                run(step)
                times[name].append(1e3 * (time.perf_counter() - began))
        ours.close()
    del losses["plain"][-1]  # a line of ours is written during the step after it
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
