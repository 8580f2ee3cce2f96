"""What a run over a slow link loses of its step time, everything that it says included.

    python benchmarks/bench_wan.py                      # table; --out FILE writes JSON
    python benchmarks/bench_wan.py --methods            # every method, over two slow links

Two hosts (network namespaces of this machine) train a Llama with DisTrO, one replica each,
`psyche-fast train` on one and `psyche-fast sidecar` on the other: first over a link that costs
nothing, then over one with a rate and a latency; with one rank per host, and with two that shard
the replica. Operations, batches, results, losses: all go over it. Needs root, iproute2 and
/dev/net/tun.

With `--methods` a whole run of each, one rank per host, in settings of few local steps, so that
several rounds go by; exchanges that would take longer than `LONGEST` are reckoned alone. The hosts
have the ranks forked, which spares each run its imports. Forward and backward take `PACE` seconds,
most of which a rank sleeps, as a host that waits for its GPU: two cores for two ranks and a relay
would show how busy they are, and not what the link costs.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import wan
from benchmarks.bench_overlap import VOCABULARY, make_model, parse
from benchmarks.common import environment, percentiles, write_json
from psyche_fast.config import RunConfig
from psyche_fast.links import Link
from psyche_fast.rank.costs import costs_of
from psyche_fast.rank.method import method_of

WARM = 3
FREE = (1e10, 0.0)
"""Rate and latency of the link to compare with: the same relay, holding nothing back."""
RANKS_PER_HOST = (1, 2)

LINKS = {"100 Mbit/s, 50 ms": (1e8, 0.05), "10 Mbit/s, 100 ms": (1e7, 0.1)}
_BESIDE = ("--every", "8", "--delay", "5", "--mix", "rebase")
METHODS = {
    "distro": ("--distro", "--distro-quantization"),
    "sparseloco": ("--method", "sparseloco", "--topk", "64", *_BESIDE),
    "diloco": ("--method", "diloco", *_BESIDE),
    "streaming-diloco": (
        "--method", "streaming-diloco", "--every", "8", "--fragments", "2", "--delay", "3",
    ),
    "muloco": ("--method", "muloco", *_BESIDE),
    "sparseloco, no delay": (
        "--method", "sparseloco", "--topk", "64", "--every", "6", "--delay", "0",
    ),
    "demo": ("--method", "demo", "--topk", "32"),
    "random-k": ("--method", "random-k", "--topk", "27"),
    "dense": ("--method", "dense"),
}  # fmt: skip
"""A run of each by its flags; those up to MuLoCo have steps beside their exchanges."""
PACE = 1.2
"""Seconds of a step's forward and backward."""
_LEARNT = 16
"""Steps of at least two rounds, in which connections come to know what a link takes."""
LONGEST = 6.0
"""Seconds of an exchange that is waited for, from which on a run is not worth its time."""
_PORT = 34567
_SHOWN = ("p50", "p95", "mean")


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
    with wan.link(*link) as hosts:
        network = ["--host", "10.98.7.1", "--port", "34567", "--local-ranks", here]
        network += ["--data-parallelism", here]
        ranks = [start(hosts[0], "train", *flags, "--output", str(output), *network)]
        ranks.append(
            start(
                hosts[1], "sidecar", "--main-host", "10.98.7.1", "--port", "34567",
                "--world-size", str(2 * ranks_per_host), "--start-rank", here,
                "--num-local-ranks", here, "--backend", "gloo",
                "--secret-file", str(folder / "secret"),
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
    return _times(output, WARM)[0]


def _prepared(folder: Path, model: Any, arguments: dict[str, Any], warm: int = WARM) -> list[str]:
    """`train` and its flags for a model and data that are written to a folder, and for a secret."""
    model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=1_000_000)
    tokens.astype("<u2").tofile(folder / "data" / "tokens.ds")
    (folder / "secret").touch(0o600)
    (folder / "secret").write_text(secrets.token_hex(32))
    return [
        "train", "--model", str(folder / "model"), "--data-path", str(folder / "data"),
        "--device", "cpu", "--param-dtype", "float32", "--threads", "1",
        "--replicas", "2", "--sequence-length", str(arguments["length"]),
        "--total-batch", str(4 * arguments["micro"]), "--secret-file", str(folder / "secret"),
        "--total-steps", str(arguments["steps"] + warm),
    ]  # fmt: skip


def _times(output: Path, warm: int) -> tuple[list[float], list[float]]:
    """Milliseconds of a run's steps but for the first ones, whole and without training.

    Forward and backward wait for no link. What is left of a step is its exchange, its update and
    the wait for the others, which says what a link costs where the machine itself is not steady.
    """
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines()[warm:])
    both = [(1e3 * m["step_seconds"], 1e3 * m["seconds"]["train"]) for m in lines]
    return [step for step, _ in both], [step - train for step, train in both]


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
        flags = _prepared(folder, model, arguments)[1:]
        flags += ["--distro"]
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


class Hosts:
    """Two hosts on which ranks are forked from a process that has imported what they need."""

    def __init__(self, names: Sequence[str]) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wan0"}
        command = [sys.executable, __file__, "--host-of-ranks"]
        self._hosts = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command], env=environ, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
            for name in names
        ]  # fmt: skip

    def run(self, port: int, *words: str) -> None:
        """One run of `psyche-fast`, a rank on each host."""
        for rank, host in enumerate(self._hosts):
            assert host.stdin is not None
            host.stdin.write(json.dumps({"rank": rank, "port": port, "words": words}) + "\n")
            host.stdin.flush()
        said = [host.stdout.readline() for host in self._hosts]  # type: ignore[union-attr]
        if any(line.strip() != "0" for line in said):
            raise RuntimeError(f"the run failed with {said}: {' '.join(words)}")

    def close(self) -> None:
        """End both."""
        for host in self._hosts:
            host.kill()
            host.wait()


def _host_of_ranks() -> None:
    """Runs what is asked for on standard input, each in a process of its own."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from psyche_fast import cli
    from psyche_fast.rank.trainer import Trainer

    compute = Trainer._forward_backward

    def paced(trainer: Trainer, batch: Any) -> Any:
        until = time.monotonic() + PACE
        found = compute(trainer, batch)
        time.sleep(max(0.0, until - time.monotonic()))
        return found

    Trainer._forward_backward = paced  # type: ignore[method-assign]
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1):
                os.dup2(null, stream)
            os.environ |= {  # as torchrun has them
                "TORCHELASTIC_RUN_ID": "wan", "TORCHELASTIC_USE_AGENT_STORE": "False",
                "RANK": str(asked["rank"]), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.98.7.1",
                "MASTER_PORT": str(asked["port"]),
            }  # fmt: skip
            status = 1
            try:
                cli.main(asked["words"])
                status = 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _reckoned(model: Any, flags: Sequence[str], link: tuple[float, float]) -> tuple[int, float]:
    """Steps that go on beside an exchange of a method, and how long it takes over a link."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=False))
    values: dict[str, Any] = {k[2:].replace("-", "_"): v for k, v in pairs.items()}
    for name in ("every", "delay", "fragments", "topk"):
        if name in values:
            values[name] = int(values[name])
    if flags[0] == "--distro":
        values = {"distro": True, "distro_quantization": True}
    run = RunConfig.of(replicas=2, param_dtype="float32", **values)
    costs = costs_of(run, dict(model.named_parameters()), method_of(run))
    rate, latency = link
    return costs.delay, costs.exchange_seconds(Link(rate, rate, latency))


def measure_methods(
    names: Sequence[str] = tuple(METHODS), **arguments: Any
) -> tuple[int, list[dict[str, Any]]]:
    """Runs methods over a link that costs nothing, and over each of `LINKS`.

    Args:
        names: of `METHODS`.
        **arguments: `steps`, `width`, `layers`, `micro` rows of `length`.

    Returns:
        parameters, and rows of the table.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(arguments)
        flags = _prepared(folder, model, arguments, _LEARNT)
        times: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        with ExitStack() as stack:
            # All links are up at once, and a method goes over all of them at the same time: how
            # fast this machine is changes in the minutes of a table.
            ranks = {}
            for number, (link, values) in enumerate({"none": FREE, **LINKS}.items()):
                hosts = stack.enter_context(wan.link(*values, name=f"wan{number}"))
                ranks[link] = stack.enter_context(closing(Hosts(hosts)))
            pool = stack.enter_context(ThreadPoolExecutor(len(ranks)))

            def run(method: str, link: str, port: int) -> None:
                delay, exchange = _reckoned(model, METHODS[method], LINKS.get(link, FREE))
                if exchange > LONGEST and not delay:
                    return
                output = folder / f"{method}-{link[:3]}"
                ranks[link].run(
                    port, *flags, *METHODS[method], "--output", str(output),
                    "--micro-batch", str(arguments["micro"]),
                )  # fmt: skip
                times[method, link] = _times(output, _LEARNT)

            for port, method in enumerate(names, _PORT):
                for finished in [pool.submit(run, method, link, port) for link in ranks]:
                    finished.result()
        rows = []
        for method, link in ((m, li) for m in names for li in LINKS):
            delay, exchange = _reckoned(model, METHODS[method], LINKS[link])
            free, slow = times[method, "none"], times.get((method, link))
            rows.append(
                {
                    "method": method, "link": link, "exchange_seconds": exchange, "delay": delay,
                    "fits": exchange <= 0.9e-3 * delay * _mean(free[0]),
                    "free": _figures(*free), "slow": slow and _figures(*slow),
                }
            )  # fmt: skip
        return sum(p.numel() for p in model.parameters()), rows


def _mean(times: Sequence[float]) -> float:
    return sum(times) / len(times)


def _figures(steps: Sequence[float], rest: Sequence[float]) -> dict[str, Any]:
    """Milliseconds of steps, and of what of them is not forward and backward."""
    return {
        "step_ms": {**percentiles(steps), "mean": _mean(steps)},
        "rest_ms": {**percentiles(rest), "mean": _mean(rest)},
    }


def _print_methods(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'':<21} {'':<18} {'':>9} {'':>7} {'step without link, ms':>23} {'step, ms':>23} "
        f"{'not training, of the step':>26}"
    )
    print(
        f"{'method':<21} {'link':<18} {'exchange':>9} {'beside':>7}"
        + "".join(f"{p:>8}" for p in _SHOWN) * 3
    )
    for row in rows:
        free, slow = row["free"], row["slow"]
        beside = "blocks" if not row["delay"] else "fits" if row["fits"] else "too big"
        print(
            f"{row['method']:<21} {row['link']:<18} {row['exchange_seconds']:7.2f} s {beside:>7}",
            end="",
        )
        for step in (free, slow):
            if step:
                print("".join(f"{step['step_ms'][p]:8.0f}" for p in _SHOWN), end="")
        if slow is None:
            print(" not run: takes too long")
            continue
        whole = free["step_ms"]["mean"]
        more = [(slow["rest_ms"][p] - free["rest_ms"][p]) / whole for p in _SHOWN]
        print("".join(f"{share:+8.1%}" for share in more))


def main() -> None:
    if "--host-of-ranks" in sys.argv:
        _host_of_ranks()
        return
    methods = "--methods" in sys.argv
    if methods:
        sys.argv.remove("--methods")
    arguments = parse(__doc__.splitlines()[0])
    out = arguments.pop("out")
    if methods:
        parameters, rows = measure_methods(**arguments)
        print(f"{parameters:,} float32 parameters, 2 replicas, a host each")
        _print_methods(rows)
        if out:
            report = {"benchmark": "wan of methods", **arguments, "parameters": parameters}
            write_json(out, {**report, "environment": environment(), "rows": rows})
        return
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
