"""What `--link auto` and `estimate --link HOST` measure of a link whose rate and latency are known.

    python benchmarks/bench_link.py                     # table; --out FILE writes JSON

Two hosts (network namespaces of this machine) with a link between them, measured by ranks of a gloo
group and by two processes on a connection of their own. Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import wan
from benchmarks.common import environment, write_json
from psyche_fast.links import Link

LINKS = tuple((1e6 * mbit, latency) for mbit in (10, 100) for latency in (0.05, 0.1))
WAYS = ("ranks", "hosts")
_ASK = "import sys; from psyche_fast.start.probe import ask; print(ask(sys.argv[1]))"


def _rank(rank: int, store: str) -> None:
    """One of two ranks that measure."""
    import torch.distributed as dist

    from psyche_fast.rank.link import measure as among

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    found = among(dist.group.WORLD)
    if rank == 0:
        print(json.dumps([asdict(link) for link in found]))
    dist.barrier()
    dist.destroy_process_group()


def _start(host: str, *words: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", host, sys.executable, *words]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "wan0", "OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)


def measure(way: str, bits_per_second: float, latency: float) -> list[dict[str, float]]:
    """Links as they have been found: of both ranks, or of the host that asks.

    Args:
        way: one of `WAYS`.
        bits_per_second: of the link, each way.
        latency: of the link, one way.
    """
    with wan.link(bits_per_second, latency) as hosts, tempfile.TemporaryDirectory() as folder:
        if way == "ranks":
            store = f"{folder}/store"
            processes = [_start(h, __file__, str(n), store) for n, h in enumerate(hosts)]
        else:
            processes = [_start(hosts[1], "-m", "psyche_fast", "link")]
            listening = processes[0].stdout
            assert listening is not None
            listening.readline()
            processes.append(_start(hosts[0], "-c", _ASK, "10.98.7.2"))
        try:
            said = processes[0 if way == "ranks" else 1].communicate(timeout=120)[0]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return json.loads(said) if way == "ranks" else [asdict(Link.parse(said.strip()))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    out = parser.parse_args().out
    rows: list[dict[str, Any]] = []
    print(f"{'':<6} {'Mbit/s':>7} {'ms':>5} {'up':>7} {'down':>7} {'latency':>7} {'seconds':>7}")
    for way in WAYS:
        for rate, latency in LINKS:
            began = time.perf_counter()
            for found in measure(way, rate, latency):
                seconds = time.perf_counter() - began
                rows.append(
                    {"way": way, "rate": rate, "latency": latency, "found": found, "took": seconds}
                )
                print(
                    f"{way:<6} {rate / 1e6:7g} {1e3 * latency:5g} {found['up'] / 1e6:7.1f} "
                    f"{found['down'] / 1e6:7.1f} {1e3 * found['latency']:7.1f} {seconds:7.1f}"
                )
    if out:
        write_json(out, {"benchmark": "link", "environment": environment(), "rows": rows})


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("0", "1"):
        _rank(int(sys.argv[1]), sys.argv[2])
    else:
        main()
