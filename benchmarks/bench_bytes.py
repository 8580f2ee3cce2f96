"""What every method sends per 4096 parameters and inner step, counted of real messages.

    python benchmarks/bench_bytes.py                    # table; --out FILE writes JSON

A Llama's parameters with random gradients go through whole rounds of each method; the bytes of the
messages that are sent, headers and vectors' own entries included, are divided by the number of
inner steps and of 4096 parameters. Each message is read by a receiver, who has to find it good.
Beside them what each reference sends, by the form that its code or paper says; not measured here.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, write_json
from psyche_fast.bench.shapes import Shapes, elements, llama
from psyche_fast.distro import DistroStep
from psyche_fast.distro.message import MessageFormat
from psyche_fast.methods import Replica, get

CHUNK = 4096
SHAPES = llama(vocabulary=2048, width=512, layers=4, key_value=128, hidden=1408, tied=True)
LEARNING_RATE = 1e-3
DENSE = 2.0 * CHUNK
"""Bytes of a gradient in bfloat16."""


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: of a preset; "train --distro" for DisTrO's own optimiser.
        changes: of its fields.
        reference: bytes per 4096 parameters and inner step of a reference with these settings.
        source: whose, and in what form.
    """

    name: str
    changes: dict[str, Any]
    reference: float | None
    source: str

    @property
    def label(self) -> str:
        """Name and settings."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.changes.items())])


def _by_index(k: int, index: float, value: float, every: int = 1) -> float:
    return k * (index + value) / every


CASES = (
    *(
        Case(name, {"k": k}, _by_index(k, 2, 1 / 8), "Psyche: uint16 indices, a bit per sign")
        for name in ("train --distro", "distro")
        for k in (2, 4, 8)
    ),
    Case("demo", {}, _by_index(32, 8, 4), "DeMo's code: int64 indices, values as parameters"),
    Case("demo", {"values": "bf16"}, _by_index(32, 8, 2), "the same with bfloat16 parameters"),
    Case("demo-v2", {}, _by_index(32, 8, 4), "as DeMo's first version; the second's is not out"),
    Case("sparseloco", {}, _by_index(64, 1.5, 0.25, 30), "Covenant-72B: 12-bit indices, 2 bits"),
    Case(
        "sparseloco", {"values": "codebook4"}, _by_index(64, 8, 1, 30),
        "CCLoco's code: int64 indices, a byte per value",
    ),
    Case("diloco", {}, DENSE / 500, "OpenDiLoCo: 16 bits, H 500"),
    Case("diloco", {"every": 100, "values": "8bit"}, CHUNK / 100, "INTELLECT-1: 8 bits, H 100"),
    Case("streaming-diloco", {}, CHUNK / 2 / 30, "Streaming DiLoCo's paper: 4 bits, E3M0"),
    Case("muloco", {}, CHUNK / 2 / 30, "MuLoCo's paper: 4 bits; its code simulates them"),
    Case("muloco", {"values": "2bit"}, CHUNK / 4 / 30, "MuLoCo's paper: 2 bits"),
    Case("random-k", {}, 27 * 2, "DeToNATION's: no indices, values of 16 bits"),
    Case("dense", {}, DENSE, "a gradient in bfloat16"),
)  # fmt: skip


def _parameters(shapes: Shapes) -> dict[str, torch.Tensor]:
    """With gradients; matrices of layers have their numbers, as fragments take them."""
    generator = torch.Generator().manual_seed(0)
    named = {}
    for at, shape in enumerate(shapes):
        p = torch.randn(shape, generator=generator).mul_(0.02).requires_grad_()
        p.grad = torch.randn(shape, generator=generator)
        named[f"layers.{(at - 1) // 9}.{at}" if 0 < at < len(shapes) - 1 else f"end.{at}"] = p
    return named


def _own_distro(shapes: Shapes, k: int) -> tuple[int, int]:
    step = DistroStep(
        _parameters(shapes), compression_topk=k, compression_chunk=64, compression_decay=0.999
    )
    form = MessageFormat(step.layout, step.backends, signs=True)
    entries = step.compress(None, LEARNING_RATE)
    message = form.pack(entries)
    _, faults = form.unpack(message[None])
    assert not faults, faults
    return message.nbytes, 1


def count(case: Case, shapes: Shapes) -> tuple[int, int]:
    """Bytes of a replica's messages, and the inner steps that they are of: two whole rounds."""
    if case.name == "train --distro":
        return _own_distro(shapes, case.changes["k"])
    method = get(case.name, **case.changes)
    replica = Replica(method, _parameters(shapes), replica=0, replicas=1)
    sent, steps, pending = 0, 2 * method.every, deque[torch.Tensor]()
    for step in range(steps):
        replica.before_forward(step)
        if method.is_local and step > 0:
            replica.stepped()  # what has been trained does not change how much is sent
        else:
            replica.local(LEARNING_RATE)
        message = replica.send()
        if message is not None:
            assert message.nbytes == replica.bytes_sent(step)
            sent += message.nbytes
            pending.append(message)
        while replica.due():
            faults = replica.receive(pending.popleft()[None])
            assert not faults, faults
    return sent, steps


def measure(cases: Sequence[Case] = CASES, shapes: Shapes = SHAPES) -> list[dict[str, Any]]:
    """The table's rows."""
    chunks = elements(shapes) / CHUNK
    rows = []
    for case in cases:
        sent, steps = count(case, shapes)
        rows.append(
            {
                "method": case.label, "bytes": sent, "inner_steps": steps,
                "per_chunk": sent / chunks / steps, "reference": case.reference,
                "source": case.source,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    report = {
        "benchmark": "bytes", "environment": environment(), "parameters": elements(SHAPES),
        "matrices": sum(len(s) > 1 for s in SHAPES), "rows": measure(),
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{report['parameters']:,} parameters in {report['matrices']} matrices and the vectors")
    print(f"{'method':<32} {'bytes':>9} {'reference':>9}")
    for row in report["rows"]:
        theirs = math.nan if row["reference"] is None else row["reference"]
        print(f"{row['method']:<32} {row['per_chunk']:9.2f} {theirs:9.2f}  {row['source']}")
    if out:
        write_json(out, report)


if __name__ == "__main__":
    main()
