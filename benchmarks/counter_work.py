"""What `gpu_counters.py` runs in processes of their own, on the path that the suite measures.

python benchmarks/counter_work.py encode            # one kernel's launches, for a profiler
python benchmarks/counter_work.py bits --out FILE   # what encode and apply make of given input
python benchmarks/counter_work.py product           # a matrix product right after encode
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import smoke
from benchmarks.common import device_here, percentiles
from psyche_fast.bench import kernel_cases as make
from psyche_fast.bench.kernel_data import Data, Work
from psyche_fast.bench.shapes import SETS
from psyche_fast.kernels import tuning
from psyche_fast.kernels.autotune import gpu_name, using

KERNELS = {
    "encode": partial(make.encode, k=8),
    "apply": partial(make.apply, peers=16, signs=True),
    "accumulate": partial(make.accumulate, which="last"),
}
LAUNCHES = 3
"""Calls of a kernel that a profiler may choose from; the first compiles."""
REPEATS = 20


def backend_here() -> str:
    """Of the kernels: the GPU's, or Triton's interpreter."""
    return "triton" if device_here().type == "cuda" else "interpret"


def launch(kernel: str, layers: str) -> dict[str, Any]:
    """Run one kernel a few times, with nothing else of Triton's between."""
    device = device_here()
    data = Data(SETS[layers], device, torch.bfloat16)
    work: Work = KERNELS[kernel](data, backend_here())
    for _ in range(LAUNCHES):
        work.calls[backend_here()]()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"bytes": work.bytes, "elements": data.elements, "launches": LAUNCHES}


def bits(out: Path, against: Path | None, *, repeats: int, tiny: bool) -> dict[str, Any]:
    """Run encode and apply again and again on the same input.

    Input is drawn on the CPU and small enough for the interpreter.

    Args:
        out: where the first results go.
        against: results of another machine, or of the interpreter, that these are compared with.
        repeats: how often.
        tiny: one chunk of 64 x 64 instead of twelve.

    Returns:
        "differ": by result, elements of repeated runs that are not the first's, bit for bit; or of
        the first run that are not those of `against`. "of" is how many there are.
    """
    device, backend = device_here(), backend_here()
    differ: dict[str, int] = {}
    first: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, tensor in made(device, backend, tiny).items():
            kept = first.setdefault(name, tensor)
            differ[name] = differ.get(name, 0) + int((_raw(kept) != _raw(tensor)).sum())
    torch.save(first, out)
    if against is not None:
        other = torch.load(against, weights_only=True)
        assert other.keys() == first.keys()
        differ = {name: int((_raw(first[name]) != _raw(other[name])).sum()) for name in first}
    sizes = {name: tensor.numel() for name, tensor in first.items()}
    return {"repeats": repeats, "differ": differ, "of": sizes}


def made(device: torch.device, backend: str, tiny: bool) -> dict[str, Tensor]:
    """What encode and apply make of the same input on every machine, on the CPU."""
    results: dict[str, Tensor] = {}
    for kind, shapes in (("tiles", [(64, 64)] if tiny else [(256, 192)]), ("rows", [(67, 64)])):
        for name, operation in (
            ("encode", smoke.encode),
            ("apply", partial(smoke.apply, signs=False, ahead=False)),
        ):
            data = Data(shapes, device, torch.bfloat16, drawn_on=smoke.CPU)
            for what, tensor in operation(data, backend).items():
                results[f"{name} {kind}, {what}"] = tensor.detach().cpu().contiguous()
    return results


def _raw(tensor: Tensor) -> Tensor:
    """The bits as integers: a NaN is equal to itself, and -0 is not 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.dtype.itemsize])


def product(layers: str, *, side: int, rounds: int) -> dict[str, Any]:
    """Time a bf16 matrix product right after encode, whose scratch the L2 cache may keep.

    Settings take turns, round by round.

    Returns:
        By setting of encode's option `keep`, and "without encode", milliseconds of the product.
    """
    device, backend = device_here(), backend_here()
    data = Data(SETS[layers], device, torch.bfloat16)
    call = KERNELS["encode"](data, backend).calls[backend]
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    options = tuning.options("encode", device)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for keep in ("evict_last", "", None):
                name = "without encode" if keep is None else f"keep = {keep!r}"
                if keep is not None:
                    path = Path(folder) / f"{keep or 'none'}{number}.toml"
                    with using(path, gpu_name(device), {"encode": {**options, "keep": keep}}):
                        call()
                taken = _timed(left, right)
                if number:  # the first compiles
                    times.setdefault(name, []).append(taken)
    return {"side": side, "ms": {name: percentiles(values) for name, values in times.items()}}


def _timed(left: Tensor, right: Tensor) -> float:
    if left.device.type != "cuda":
        torch.mm(left, right)
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(left, right)
    end.record()
    torch.cuda.synchronize(left.device)
    return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", choices=[*KERNELS, "bits", "product"])
    parser.add_argument("--out", type=Path, help="bits: file for the results")
    parser.add_argument("--against", type=Path, help="bits: results that these are compared with")
    parser.add_argument("--tiny", action="store_true", help="dry run on a CPU")
    arguments = parser.parse_args()
    if device_here().type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("no CUDA device, and TRITON_INTERPRET=1 is not set")
    layers = "tiny" if arguments.tiny else "1.2B"
    if arguments.work == "bits":
        if arguments.out is None:
            parser.error("--out is missing: a file for the results")
        repeats = 2 if backend_here() == "interpret" else REPEATS
        found = bits(arguments.out, arguments.against, repeats=repeats, tiny=arguments.tiny)
    elif arguments.work == "product":
        side, rounds = (64, 2) if arguments.tiny else (4096, 30)
        found = product(layers, side=side, rounds=rounds)
    else:
        found = launch(arguments.work, layers)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
