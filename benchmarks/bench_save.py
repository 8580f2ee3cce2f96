"""How long a checkpoint keeps a step waiting, against writing it before anything else happens.

    python benchmarks/bench_save.py              # prints the comparison; --out FILE writes JSON
    make bench                                   # the same under pytest

One rank of `train` on a CPU, AdamW and DisTrO. `pause` is all that the training thread does or
waits for because of a checkpoint that is copied during the next step and written beside training,
from the end of its step to the end of the next one. `at once` is the same checkpoint, durable
before training goes on, as at the end of a run. What the threads take from the cores is in
`slower`: how much longer the steps after a checkpoint took together than as many without one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import transformers

from benchmarks.common import environment
from psyche_fast.config import RunConfig
from psyche_fast.core.evaluation import Evaluation
from psyche_fast.core.plan import make_plan
from psyche_fast.core.run import Core, steps
from psyche_fast.core.saving import Checkpoints
from psyche_fast.core.watch import Watch
from psyche_fast.data import BatchPrefetcher
from psyche_fast.metrics import Console, PhaseTimer
from psyche_fast.rank.beats import Patience
from psyche_fast.rank.protocol import Sender
from psyche_fast.rank.serve import build_trainer
from psyche_fast.rank.snapshot import Snapshot
from psyche_fast.rank.topology import join
from psyche_fast.rank.trainer import Trainer
from psyche_fast.start.network import listen
from psyche_fast.start.signals import StopRequest
from psyche_fast.start.store import host_store

LENGTH = 256
VOCABULARY = 13_312
EVERY = 4
METHODS: dict[str, dict[str, Any]] = {
    "AdamW, fp32": {"param_dtype": "float32"},
    "AdamW, bf16 with fp32 masters": {},
    "DisTrO, fp32": {"param_dtype": "float32", "distro": True},
    "DisTrO, bf16 with fp32 masters": {"distro": True},
}


def prepare(folder: Path, width: int) -> int:
    """A Llama and random tokens; its number of parameters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=8, num_attention_heads=8, max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 256 * LENGTH, dtype=np.uint16)
    tokens.tofile(folder / "data" / "tokens.bin")
    return sum(p.numel() for p in model.parameters())


class Stopwatch:
    """Adds up the seconds that the training thread spends in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> Any:
        """A patch that counts what a method takes."""
        method: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return mock.patch.object(owner, name, counted)


PARTS = (
    (Checkpoints, "is_due"), (Checkpoints, "begin"), (Trainer, "_begin_snapshot"),
    (Snapshot, "wait"), (Trainer, "_compare"), (Snapshot, "hand_over"),
)  # fmt: skip
"""All that the training thread does for a checkpoint beside training."""


def measure(folder: Path, saves: int, **method: Any) -> dict[str, Any]:
    """Trains with `saves` checkpoints, then writes as many at once; medians."""
    count = EVERY * (2 * saves + 1)
    run = folder / "run"
    plan = make_plan(
        RunConfig.of(
            model=str(folder / "model"), data_path=str(folder / "data"), sequence_length=LENGTH,
            micro_batch=1, total_batch=1, warmup_steps=0, learning_rate=1e-4, device="cpu",
            total_steps=count + 1, checkpoint_every=2 * EVERY, keep=1, output=str(run), threads=1,
            **method,
        )
    )  # fmt: skip
    seconds = timedelta(seconds=60)
    store = host_store(listen("127.0.0.1", 0), 1, seconds)
    join("gloo", store, 1, 0, torch.device("cpu"), seconds)
    watch = Stopwatch()
    pauses, times, at_once = [], [], []
    try:
        trainer = build_trainer(plan.resolved, plan.source, torch.device("cpu"))
        sender, console = Sender(store, 1), Console(count, 1)
        checkpoints = Checkpoints(plan, run, trainer, sender, store, console.message)
        timer, patience = PhaseTimer(), Patience(60.0)
        watch_ = Watch(store, 1, timer, patience, patience, run, lambda: None)
        nothing = Evaluation(plan.held, plan.resolved, trainer, timer, run, None)
        core = Core(
            plan, run, trainer, sender, checkpoints, StopRequest(), console, timer, watch_, nothing
        )
        with ExitStack() as stack:
            for owner, name in PARTS:
                stack.enter_context(watch.around(owner, name))
            batches = stack.enter_context(
                BatchPrefetcher(plan.dataset, plan.config.batch_sizes, 1, count + 1)
            )
            ours = steps(core, batches, lambda _: None)
            for step in range(1, count + 1):
                if step % (2 * EVERY) == 0:
                    watch.seconds = 0.0
                began = time.perf_counter()
                next(ours)
                times.append(time.perf_counter() - began)
                if step % (2 * EVERY) == 1 and step > 1:
                    pauses.append(watch.seconds)
                if step % EVERY == EVERY - 1:
                    checkpoints.wait()  # four steps with one, four without, in turns
            ours.close()
        for number in range(saves):
            began = time.perf_counter()
            path = checkpoints.write(count + 1 + number)
            at_once.append(time.perf_counter() - began)
        sizes = [(f.parent.name == "state", f.stat().st_size) for f in path.rglob("*")]
    finally:
        dist.destroy_process_group()
    # A period begins with the step after whose end a checkpoint was begun.
    turns = [times[at : at + EVERY - 1] for at in range(EVERY, count - EVERY + 1, EVERY)]
    saving, without = turns[1::2], turns[0::2]
    slower = [sum(a) - sum(b) for a, b in zip(saving, without, strict=False)]
    return {
        "pause": float(np.median(pauses)),
        "longest_pause": max(pauses),
        "at_once": float(np.median(at_once)),
        "share": float(np.median(pauses) / np.median(at_once)),
        "slower": float(np.median(slower)),
        "step": float(np.median([t for turn in without for t in turn])),
        "state_bytes": sum(size for is_state, size in sizes if is_state),
        "model_bytes": sum(size for is_state, size in sizes if not is_state),
    }


def compare(saves: int = 3, width: int = 512) -> dict[str, Any]:
    """All methods, one after the other."""
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        with tempfile.TemporaryDirectory() as place:
            found["parameters"] = prepare(Path(place), width)
            found[name] = measure(Path(place), saves, **method)
    return found


def test_a_checkpoint_keeps_a_step_waiting_for_less_than_five_percent_of_its_time() -> None:
    result = compare()
    print(json.dumps(result))
    assert all(result[name]["share"] < 0.05 for name in METHODS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    result = {"environment": environment(), **compare(args.saves, args.width)}
    print(f"{result['parameters'] / 1e6:.1f} M parameters")
    for name in METHODS:
        r = result[name]
        print(
            f"{name:32} pause {1e3 * r['pause']:6.1f} ms, at once {1e3 * r['at_once']:7.1f} ms: "
            f"{r['share']:.1%}; step {1e3 * r['step']:6.1f} ms, "
            f"slower {1e3 * r['slower']:6.1f} ms; "
            f"state {r['state_bytes'] / 1e6:.0f} MB, model {r['model_bytes'] / 1e6:.0f} MB"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
