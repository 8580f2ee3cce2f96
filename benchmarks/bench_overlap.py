"""How much of the exchange between replicas a step has to wait for, over a slow link.

    python benchmarks/bench_overlap.py                  # table; --out FILE writes JSON

Two replicas (gloo processes on this machine) train a Llama with DisTrO. The link is injected: an
exchange's results are held back until the link would have brought them, a latency and the other
replica's bytes at the link's rate after they were handed over. With overlap, as the product does
it, step t's results are waited for after step t+1's backward; without, right where they are sent.
Only this exchange is slowed: what the core says to its sidecars in each step is not in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, percentiles, write_json
from psyche_fast.batch import Batch
from psyche_fast.config import Optimizer, Training
from psyche_fast.distro import exchange
from psyche_fast.models import load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.optimizers import make_optimizer
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, trainable
from psyche_fast.schedules import Constant

VOCABULARY = 2048
MODES = ("no link", "overlap", "no overlap")


@dataclass
class Link:
    """Holds results back, and counts the seconds that are waited for them."""

    latency: float = 0.0
    bits_per_second: float = float("inf")
    overlap: bool = True
    waited: float = 0.0

    def start(self, message: Tensor, peers: dist.ProcessGroup | None) -> Any:
        """What takes the place of `exchange.start`."""
        begun = time.perf_counter()
        pending = self._start(message, peers)
        there = begun + self.latency + 8 * message.nbytes / self.bits_per_second

        class Held:
            bytes_sent = pending.bytes_sent
            wait = pending.wait
            senders = pending.senders

            def host(self) -> Tensor:
                received = pending.host()
                time.sleep(max(there - time.perf_counter(), 0.0))
                return received

        held = Held()
        if not self.overlap:
            self._waits(held.host)
        return held

    def agree(self, *arguments: Any) -> dict[int, str]:
        """What takes the place of `exchange.agree`: as long on its way as a result."""
        time.sleep(self.latency)
        return self._agree(*arguments)

    def receive(self, receiver: exchange.Exchange) -> Any:
        """What takes the place of `Exchange.receive`."""
        if receiver._unpacking is None:
            self._waits(receiver._under_way[0][1].result)
        return self._receive(receiver)

    def _waits(self, wait: Callable[[], object]) -> None:
        asked = time.perf_counter()
        wait()
        self.waited += time.perf_counter() - asked

    _start = staticmethod(exchange.start)
    _agree = staticmethod(exchange.agree)
    _receive = staticmethod(exchange.Exchange.receive)


def _measure(rank: int, folder: str, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    topology = Topology.build(1, 1, torch.device("cpu"))
    options = Optimizer(
        distro=True, weight_decay=0.1, compression_decay=0.999, compression_topk=8,
        compression_chunk=64, distro_quantization=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    length, rows = arguments["length"], 2 * arguments["micro"]
    found: dict[str, Any] = {}
    for mode in MODES:
        model = load_model(
            resolve_model(f"{folder}/model"), device=torch.device("cpu"), param_dtype=torch.float32
        )
        schedule = Constant(base_lr=1e-3, warmup_init_lr=0.0, warmup_steps=0)
        optimizer = make_optimizer(options, trainable(model), topology.peers)
        training = Training(micro_batch=arguments["micro"], check_every=0)
        trainer = Trainer(model, topology, schedule, optimizer, training, options.max_grad_norm)
        link = Link(overlap=mode != "no overlap")
        if mode != "no link":
            link.latency = arguments["latency_ms"] / 1e3
            link.bits_per_second = arguments["mbit"] * 1e6
        steps, exposed = [], []
        with (
            mock.patch.object(exchange, "start", link.start),
            mock.patch.object(exchange, "agree", link.agree),
            mock.patch.object(exchange.Exchange, "receive", lambda e, link=link: link.receive(e)),
        ):
            for step in range(1, arguments["steps"] + 3):
                batch = Batch(torch.randint(VOCABULARY, (rows, length), generator=generator))
                dist.barrier()
                link.waited, began = 0.0, time.perf_counter()
                trainer.train(step, batch.share(rank, 2))
                trainer.optimize(step)
                if step > 2:
                    steps.append(1e3 * (time.perf_counter() - began))
                    exposed.append(1e3 * link.waited)
            trainer.plain()  # nothing is under way when the group ends
        found[mode] = {
            "step_ms": percentiles(steps),
            "exposed_ms": percentiles(exposed),
            "bytes": trainer.bytes_sent,
        }
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def make_model(arguments: dict[str, Any]) -> transformers.LlamaForCausalLM:
    """A Llama of `width` and `layers`."""
    width = arguments["width"]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=arguments["layers"], num_attention_heads=width // 64,
        num_key_value_heads=max(width // 128, 1), max_position_embeddings=1024,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def parse(description: str) -> dict[str, Any]:
    """The options of a benchmark of a slow link."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--mbit", type=float, default=100.0, help="rate of the link")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="of one direction")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return vars(parser.parse_args())


def measure(spawn: Callable[..., object] = mp.spawn, **arguments: Any) -> dict[str, Any]:
    """Run all modes; the figures are of rank 0.

    Args:
        spawn: starts the two processes.
        **arguments: `mbit`, `latency_ms`, `steps`, `width`, `layers`, `micro` rows of `length`.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(arguments)
        model.save_pretrained(f"{folder}/model")
        spawn(_measure, (folder, arguments), nprocs=2)
        found: dict[str, Any] = torch.load(f"{folder}/0")
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, **found}


def test_what_fits_the_compute_is_hidden():
    arguments = {"width": 256, "layers": 4, "length": 128, "micro": 4, "steps": 6}
    found = measure(mbit=100.0, latency_ms=50.0, **arguments)
    print(found)
    step = found["no link"]["step_ms"]["p50"]
    assert step > 60, "or there is nothing to hide 50 ms behind"
    assert found["overlap"]["exposed_ms"]["p50"] < 0.05 * step
    assert found["no overlap"]["exposed_ms"]["p50"] > 40


def main() -> None:
    arguments = parse(__doc__.splitlines()[0])
    out = arguments.pop("out")
    report = {
        "benchmark": "overlap", **arguments, "environment": environment(), **measure(**arguments)
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{report['parameters']:,} float32 parameters; {report['overlap']['bytes']:,} bytes sent")
    print(f"{'ms (p50)':>12} {'step':>10} {'exposed':>10} {'of the step':>12}")
    for mode in MODES:
        step, exposed = (report[mode][key]["p50"] for key in ("step_ms", "exposed_ms"))
        print(f"{mode:>12} {step:10.1f} {exposed:10.1f} {exposed / step:12.1%}")
    if out:
        write_json(out, report)


if __name__ == "__main__":
    main()
