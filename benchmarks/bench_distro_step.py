"""One step of `psyche_fast.DeMo` against a plain formulation, parameter by parameter.

    python benchmarks/bench_distro_step.py                    # table; --out FILE writes JSON
    python -m pytest benchmarks -o python_files='bench_*.py'  # the same cases under
    pytest-benchmark

The plain formulation is what the reference DeMo does for each parameter (arXiv 2411.19870,
`demo.py`): transform by one einsum, top-k, gather, decode the own result by scatter-mean and
einsum, decode the peers' mean likewise, sign, SGD. The two take turns step by step, so that
whatever else the machine does disturbs both alike; a ratio is only given when their parameters
agree after the same steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, percentiles
from psyche_fast.distro import DeMo

CHUNK = 64
DECAY = 0.999
LEARNING_RATE = 4e-4
THREADS = 2
TOPKS = (8, 32)


def gpt_shapes(layers: int = 6, width: int = 256, vocabulary: int = 1024) -> list[tuple[int, ...]]:
    """Matrices and vectors as a GPT has them; 5.0 million elements by default."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (CHUNK, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width)]
        shapes += [(width,)]
    return [*shapes, (width,), (width,)]


class PlainDeMo:
    """DeMo for one peer with every operation done per parameter."""

    def __init__(self, parameters: list[torch.Tensor], lr: float, topk: int) -> None:
        self.parameters, self.lr, self.topk = parameters, lr, topk
        self.delta = [torch.zeros_like(p) for p in parameters]
        self.basis: dict[int, torch.Tensor] = {}
        for p in parameters:
            for n in p.shape:
                self.basis.setdefault(side(n), dct(side(n)).to(p))

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for p, delta in zip(self.parameters, self.delta, strict=True):
            delta.mul_(DECAY).add_(p.grad, alpha=self.lr)
            index, value, shape = self.compress(self.encode(delta))
            delta.sub_(self.decode(self.scatter(index, value, shape)).view_as(delta))
            # What the all-gather of one peer returns, decoded like any number of peers.
            indices, values = torch.cat([index], dim=-1), torch.cat([value], dim=-1)
            update = self.decode(self.scatter(indices, values, shape)).view_as(p)
            p.sub_(update.sign_(), alpha=self.lr)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients of one parameter."""
        w = side(x.shape[-1])
        if x.dim() == 1:
            return torch.einsum("xw,wd->xd", x.view(-1, w), self.basis[w])
        h = side(x.shape[0])
        cut = x.view(x.shape[0] // h, h, x.shape[1] // w, w)
        return torch.einsum("yhxw,hb,wd->yxbd", cut, self.basis[h], self.basis[w])

    def decode(self, c: torch.Tensor) -> torch.Tensor:
        """Back from coefficients."""
        if c.dim() == 2:
            return torch.einsum("xd,wd->xw", c, self.basis[c.shape[-1]])
        h, w = c.shape[-2:]
        return torch.einsum("yxbd,hb,wd->yhxw", c, self.basis[h], self.basis[w]).contiguous()

    def compress(self, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
        """Indices, values and encoded shape of the largest coefficients."""
        flat = c.flatten(2) if c.dim() > 2 else c
        k = min(self.topk, flat.shape[-1])
        index = torch.topk(flat.abs(), k, dim=-1, sorted=False).indices
        return index, flat.gather(-1, index), c.shape

    @staticmethod
    def scatter(index: torch.Tensor, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Dense coefficients, each the mean of its entries."""
        flat = value.new_zeros(shape)
        flat = flat.flatten(2) if len(shape) > 2 else flat
        flat.scatter_reduce_(-1, index, value, reduce="mean", include_self=False)
        return flat.view(shape)


def side(n: int) -> int:
    return next(s for s in range(min(n, CHUNK), 0, -1) if n % s == 0)


def dct(n: int) -> torch.Tensor:
    j = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * j[:, None] + 1) * j / (2 * n)) * math.sqrt(2 / n)
    basis[:, 0] /= math.sqrt(2)
    return basis


def build(shapes: list[tuple[int, ...]], topk: int) -> dict[str, DeMo | PlainDeMo]:
    """Both optimisers, each on its own copy of the same parameters and gradients."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator) * 0.02 for s in shapes]
    gradients = [torch.randn(s, generator=generator) for s in shapes]
    copies = []
    for _ in range(2):
        parameters = [v.clone().requires_grad_() for v in values]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        copies.append(parameters)
    ours = DeMo(copies[0], LEARNING_RATE, DECAY, topk, CHUNK)
    return {"psyche_fast": ours, "plain": PlainDeMo(copies[1], LEARNING_RATE, topk)}


def check(shapes: list[tuple[int, ...]], topk: int, steps: int = 3) -> float:
    """Share of elements on which the two disagree after some steps.

    Raises:
        RuntimeError: it is over 1e-4: more than a rare sign or selection that hangs on the last
            bit.
    """
    both = build(shapes, topk)
    for optimizer in both.values():
        for _ in range(steps):
            optimizer.step()
    ours, plain = both["psyche_fast"], both["plain"]
    assert isinstance(ours, DeMo)
    assert isinstance(plain, PlainDeMo)
    differ = total = 0
    for p, q in zip(ours.param_groups[0]["params"], plain.parameters, strict=True):
        differ += int(((p - q).abs() > 0.1 * LEARNING_RATE).sum())
        total += p.numel()
    if differ > 1e-4 * total:
        raise RuntimeError(f"k={topk}: {differ} of {total} elements differ after {steps} steps")
    return differ / total


def interleave(both: dict[str, DeMo | PlainDeMo], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step of each, taking turns."""
    milliseconds: dict[str, list[float]] = {name: [] for name in both}
    for i in range(rounds + 3):
        for name, optimizer in both.items():
            start = time.perf_counter()
            optimizer.step()
            if i >= 3:  # the first ones warm up
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return milliseconds


@pytest.mark.parametrize("topk", TOPKS)
@pytest.mark.parametrize("which", ["psyche_fast", "plain"])
def test_demo_step(benchmark, which, topk):
    torch.set_num_threads(THREADS)
    shapes = gpt_shapes()
    check(shapes, topk)
    benchmark.group = f"DeMo step, {sum(map(math.prod, shapes)) / 1e6:.1f}M parameters, k={topk}"
    benchmark.extra_info.update(environment())
    optimizer = build(shapes, topk)[which]
    benchmark.pedantic(optimizer.step, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("topk", TOPKS)
def test_demo_is_two_and_a_half_times_faster(topk):
    torch.set_num_threads(THREADS)
    shapes = gpt_shapes()
    check(shapes, topk)
    times = interleave(build(shapes, topk), 30)
    medians = {name: percentiles(values)["p50"] for name, values in times.items()}
    print(medians)
    assert medians["plain"] / medians["psyche_fast"] >= 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = gpt_shapes()
    report = {
        "benchmark": "distro_step",
        "parameters": sum(map(math.prod, shapes)),
        "tensors": len(shapes),
        "dtype": "float32",
        "compression_chunk": CHUNK,
        "environment": environment(),
        "cases": [],
    }
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{report['parameters']:,} float32 parameters in {len(shapes)} tensors, chunk {CHUNK}")
    print(f"{'k':>4} {'optimiser':>12} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9}")
    for topk in TOPKS:
        disagreement = check(shapes, topk)
        milliseconds = interleave(build(shapes, topk), arguments.rounds)
        case = {"topk": topk, "disagreement": disagreement}
        for name, values in milliseconds.items():
            case[name] = percentiles(values)
            print(f"{topk:>4} {name:>12} " + " ".join(f"{v:9.2f}" for v in case[name].values()))
        case["ratio"] = case["plain"]["p50"] / case["psyche_fast"]["p50"]
        print(f"{topk:>4} {'ratio':>12} {case['ratio']:19.2f}")
        report["cases"].append(case)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
