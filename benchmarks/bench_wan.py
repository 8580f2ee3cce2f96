"""What a run over a slow link loses of its step time, everything that it says included.

    python benchmarks/bench_wan.py                      # table; --out FILE writes JSON

Two hosts (network namespaces of this machine) train a Llama with DisTrO, one replica each,
`psyche-fast train` on one and `psyche-fast sidecar` on the other: first over a link that costs
nothing, then over one with a rate and a latency; with one rank per host, and with two that shard
the replica. Operations, batches, results, losses: all go over it. Needs root, iproute2 and
/dev/net/tun.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import wan
from benchmarks.bench_overlap import VOCABULARY, make_model, parse
from benchmarks.common import environment, percentiles, write_json

WARM = 3
FREE = (1e10, 0.0)
"""Rate and latency of the link to compare with: the same relay, holding nothing back."""
RANKS_PER_HOST = (1, 2)


def _start(host: str, *words: str) -> subprocess.Popen[bytes]:
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "psyche_fast", *words]
    environ = {k: v for k, v in os.environ.items() if k != "TORCH_DISTRIBUTED_DEBUG"}
    return subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)


def _step_ms(
    folder: Path,
    name: str,
    link: tuple[float, float],
    ranks_per_host: int,
    flags: list[str],
    start: Callable[..., Any],
) -> list[float]:
    output = folder / f"{name}-{ranks_per_host}"
    here = str(ranks_per_host)
    secret = folder / "secret"
    if not secret.exists():
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
    with wan.link(*link) as hosts:
        network = ["--host", "10.98.7.1", "--port", "34567", "--local-ranks", here]
        network += ["--secret-file", str(secret)]
        network += ["--data-parallelism", here]
        ranks = [start(hosts[0], "train", *flags, "--output", str(output), *network)]
        ranks.append(
            start(
                hosts[1], "sidecar", "--main-host", "10.98.7.1", "--port", "34567",
                "--world-size", str(2 * ranks_per_host), "--start-rank", here,
                "--num-local-ranks", here, "--backend", "gloo", "--secret-file", str(secret),
            )
        )  # fmt: skip
        try:
            for rank in ranks:
                if rank.wait(600) != 0:
                    raise RuntimeError(f"the run failed: {output / 'logs'}")
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [1e3 * json.loads(line)["step_seconds"] for line in lines[WARM:]]


def measure(
    ranks_per_host: Sequence[int] = RANKS_PER_HOST,
    start: Callable[..., Any] = _start,
    **arguments: Any,
) -> dict[str, Any]:
    """Run over both links.

    Args:
        ranks_per_host: each a run of its own.
        start: starts `psyche-fast` with arguments on a host.
        **arguments: `mbit`, `latency_ms`, `steps`, `width`, `layers`, `micro` rows of `length`.

    Returns:
        milliseconds per step, by ranks per host and link.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(arguments)
        model.save_pretrained(folder / "model")
        (folder / "data").mkdir()
        tokens = np.random.default_rng(0).integers(VOCABULARY, size=1_000_000)
        tokens.astype("<u2").tofile(folder / "data" / "tokens.ds")
        flags = [
            "--model", str(folder / "model"), "--data-path", str(folder / "data"),
            "--device", "cpu", "--param-dtype", "float32", "--threads", "1", "--distro",
            "--replicas", "2", "--sequence-length", str(arguments["length"]),
            "--total-batch", str(4 * arguments["micro"]),
            "--total-steps", str(arguments["steps"] + WARM),
        ]  # fmt: skip
        slow = (arguments["mbit"] * 1e6, arguments["latency_ms"] / 1e3)
        step_ms = {}
        for ranks in ranks_per_host:
            # The same micro-batches in all of a replica's ranks together.
            own = [*flags, "--micro-batch", str(max(arguments["micro"] // ranks, 1))]
            step_ms[str(ranks)] = {
                "no link": percentiles(_step_ms(folder, "free", FREE, ranks, own, start)),
                "link": percentiles(_step_ms(folder, "slow", slow, ranks, own, start)),
            }
        return {"parameters": sum(p.numel() for p in model.parameters()), "step_ms": step_ms}


def main() -> None:
    arguments = parse(__doc__.splitlines()[0])
    out = arguments.pop("out")
    report = {
        "benchmark": "wan", **arguments, "environment": environment(), **measure(**arguments)
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{report['parameters']:,} float32 parameters, 2 replicas, a host each")
    print(f"{'ranks per host':>14} {'step':>4} {'no link ms':>11} {'link ms':>9} {'more':>7}")
    for ranks, found in report["step_ms"].items():
        for p in ("p50", "p95"):
            free, slow = (found[mode][p] for mode in ("no link", "link"))
            print(f"{ranks:>14} {p:>4} {free:11.1f} {slow:9.1f} {slow / free - 1:+7.1%}")
    if out:
        write_json(out, report)


if __name__ == "__main__":
    main()
