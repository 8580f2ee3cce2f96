"""`--link`: what is measured, what methods cost over it, and what is chosen."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_link
from psyche_fast import methods as m
from psyche_fast.config import RunConfig, read_toml
from psyche_fast.links import Link
from psyche_fast.rank.choice import Over, Place, choose, table
from psyche_fast.rank.costs import costs_of, state_bytes
from psyche_fast.rank.method import method_of
from psyche_fast.start.probe import PIECES, Pace, arrivals
from tests.core.test_resume import parameters as saved
from tests.core.test_resume import same, without_later
from tests.core.test_run import start, train
from tests.groups import Command


def model(layers: int = 3, width: int = 128) -> dict[str, Tensor]:
    shapes = {"embed.weight": (256, width), "norm.weight": (width,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{n}.weight": (width, width) for n in ("q", "v", "up")}
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


METHODS: dict[str, dict[str, Any]] = {
    "distro": {},
    "demo-v2": {},
    "sparseloco": {"every": 3},
    "sparseloco later": {"every": 4, "delay": 2, "mix": "rebase"},
    "diloco": {"every": 2},
    "streaming-diloco": {"every": 6},
    "muloco": {"every": 2},
    "random-k": {},
    "dense": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_state_and_bytes_are_those_of_a_replica(name: str) -> None:
    """In its third step; whole, so that nothing of two replicas' owners is in it."""
    method = m.get(name.split()[0], **METHODS[name])
    parameters = {n: p.requires_grad_() for n, p in model().items()}
    replica = m.Replica(method, parameters, replica=0, replicas=1)
    sent: list[int] = []
    flying: list[Tensor] = []
    for step in range(2 * method.every):
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        replica.before_forward(step)
        replica.local(1e-3)
        message = replica.send()
        sent += [] if message is None else [message.nbytes]
        flying += [] if message is None else [message]
        if len(sent) == method.fragments and replica.method.delay:
            break  # with its message in flight
        while replica.due():
            replica.receive(flying.pop(0)[None])
    state = replica.state_dict()
    found = {
        "shared": bytes_of(state["shared"]) if method.is_local or method.lookahead else 0,
        "kept and own": bytes_of(state["fragments"]),
        "outer": bytes_of(state["outer"]),
        "inner": bytes_of(state.get("inner", {})),
        "flight": sum(bytes_of(s["local"]) for s in state["in_flight"]),
    }
    wanted = state_bytes(method, parameters, 1, has_masters=True)
    assert found.pop("kept and own") == wanted.pop("kept") + wanted.pop("own")
    assert wanted.pop("masters") == wanted.pop("owner") == 0
    # Optimisers count their steps, a number per parameter.
    assert all(0 <= found[kind] - wanted[kind] <= 8 * len(parameters) for kind in wanted)
    run = RunConfig.of(method="sparseloco", replicas=2)
    if method.select == "topk":
        assert costs_of(run, parameters, method).messages == tuple(sent[: method.fragments])


def bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


def arriving(piece: float, *, lost: bool = False, ramp: bool = False) -> list[float]:
    """When pieces come that take `piece` seconds each on a link, a little unevenly."""
    generator, now, times = random.Random(0), 0.0, []
    for n in range(PIECES):
        now += piece * generator.uniform(0.9, 1.1)
        # At first a sender waits for answers, after as many pieces as it dares to send.
        now += piece * 6 if ramp and n in (1, 3, 7) else 0.0
        times.append(now)
    if lost:  # a packet of an early piece, which all later ones have to wait for
        times[4:12] = [times[12]] * 8
    return times


@pytest.mark.parametrize("kind", ["even", "lost", "ramp"])
def test_what_is_lost_or_slow_at_first_is_not_the_links_rate(kind: str) -> None:
    times = arriving(0.02, lost=kind == "lost", ramp=kind == "ramp")
    _, rate = arrivals(0.0, times, 25_000)
    assert rate == pytest.approx(10e6, rel=0.1)


def test_a_link_is_tried_with_more_until_its_rate_is_the_same_twice() -> None:
    pace, sizes = Pace(), []
    while pace.size:
        sizes.append(pace.size)
        seconds = 8 * pace.size / 50e6
        pace.took(seconds, 50e6 * min(1.0, len(sizes) / 3))
    assert pace.rate == 50e6
    assert sizes == sorted(sizes)
    assert len(sizes) == 4
    pace = Pace()
    for _ in range(20):
        if pace.size:
            pace.took(1.0, random.Random(pace.size).uniform(1e6, 9e6))
    assert pace.size == 0, "a link that is never the same ends it too"


def over(step: float, link: str = "10Mbit,100ms", **options: Any) -> tuple[Over, RunConfig]:
    run = RunConfig.of(**{"method": "sparseloco", "replicas": 4, "total_steps": 960, **options})
    found = choose(Place(run, model(12, 256), Link.parse(link), step))
    return found, run.replace(**found.changes)


def test_an_exchange_is_chosen_that_hides() -> None:
    chosen = {}
    for step in (10.0, 0.5, 0.1, 0.02):
        found, run = over(step)
        method = method_of(run)
        assert method is not None
        assert (method.every, method.delay, method.mix) == (found.every, found.delay, "rebase")
        assert found.exchange <= 0.9 * found.delay * step
        assert found.loss == 0
        assert 4 * found.delay <= method.window
        assert 960 % method.every == 0
        chosen[step] = method.every, method.k
    assert chosen[10.0] == (5, 64), "as few steps as may be"
    assert [every for every, _ in chosen.values()] == sorted(every for every, _ in chosen.values())
    assert chosen[0.02][1] <= 64


@pytest.mark.parametrize("name", ["sparseloco", "diloco", "streaming-diloco", "muloco"])
def test_what_is_given_stays(name: str) -> None:
    found, run = over(0.05, method=name, every=12, delay=2)
    assert (run.exchange.every, run.exchange.delay) == (12, 2)
    assert found.exchange == pytest.approx(found.exchange)
    fewer, _ = over(0.05, method=name, every=12)
    assert fewer.loss is not None
    assert found.loss is not None
    assert fewer.loss <= found.loss


def test_momentum_hides_by_fewer_entries_and_what_cannot_loses_least() -> None:
    found, run = over(0.5, method="distro", compression_topk=8, distro_quantization=True)
    assert run.optimizer.compression_topk == 8
    assert found.loss == 0
    found, run = over(0.15, method="distro", compression_topk=8, distro_quantization=True)
    assert run.optimizer.compression_topk > 1, "ways alone take longer than a step"
    assert found.loss is not None
    assert found.loss > 1
    found, run = over(0.1101, method="distro", compression_topk=8, link="50kbit,90ms")
    assert run.optimizer.compression_topk == 1
    assert found.loss is not None
    assert found.loss > 0
    demo, run = over(1.0, method="demo", link="10Mbit,1ms")
    assert 1 <= run.exchange.topk < 32  # type: ignore[operator]
    assert demo.loss is not None
    assert demo.loss <= 0.05
    dense, _ = over(1.0, method="dense")
    assert dense.changes == {}


def test_a_table_has_all_methods_with_their_own_settings() -> None:
    run = RunConfig.of(method="sparseloco", replicas=4)
    lines = table(Place(run, model(2), Link.parse("10Mbit,100ms"), 1.0))
    assert [line.split()[0] for line in lines] == ["method", *list(m.presets.PRESETS)]
    assert "fragments=3 wants as many layers, got 2" in lines[6]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"link": "auto", "replicas": 2, "method": None}, "--replicas 2 needs|--link needs"),
        ({"link": "auto", "replicas": 1}, "--link needs --replicas or --simulate of at least 2"),
        ({"link": "fast", "replicas": 2}, "link 'fast': wanted a rate and a latency"),
        ({"link": "auto", "replicas": 2, "method": "distro", "elastic": True}, "--link with --el"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RunConfig.of(**{"method": "sparseloco", **values})


@pytest.mark.processes
def test_a_run_keeps_what_it_has_chosen(place: Path, tmp_path: Path) -> None:
    """All ranks the same, by which the run is trained; a resumed one measures nothing."""
    words = ("--method", "sparseloco", "--link", "auto", "--replicas", "2", "--param-dtype",
             "float32", "--checkpoint-every", "2")  # fmt: skip
    whole = tmp_path / "whole"
    metrics = train(place, whole, *words, ranks=2)
    settings = read_toml(str(whole / "config.toml"))
    link = Link.parse(settings["link"])
    assert metrics[0]["link"]["up"] == link.up
    assert metrics[0]["link"]["step_seconds"] > 0
    assert "link" not in metrics[1]
    every = settings["every"]
    assert settings["delay"] == 1
    assert [line["bytes_sent"] > 0 for line in metrics] == [
        (step + 1) % every == 0 for step in range(1, len(metrics) + 1)
    ]
    resumed = without_later(whole, tmp_path / "resumed", 2)
    other = start(place, resumed, *words, "--topk", "3", "--resume", "auto", "--dry-run")
    assert other.returncode != 0
    assert "--topk 64 -> 3" in other.stderr
    train(place, resumed, *words, "--resume", "auto", ranks=2)
    assert same(saved(whole, 6), saved(resumed, 6))
    assert read_toml(str(resumed / "config.toml"))["link"] == settings["link"]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or not Path("/dev/net/tun").exists(),
    reason="needs root, iproute2 and /dev/net/tun",
)
@pytest.mark.parametrize(("way", "mbit", "latency"), [("ranks", 10, 0.05), ("hosts", 100, 0.1)])
def test_a_slow_link_is_measured(way: str, mbit: int, latency: float) -> None:
    program = "benchmarks.bench_link:rank_main"

    def start_rank(host: str, *arguments: str) -> Command:
        return Command(*arguments, program=program, host=host)

    for found in bench_link.measure(way, 1e6 * mbit, latency, start_rank):
        for rate in (found["up"], found["down"]):
            assert rate == pytest.approx(1e6 * mbit, rel=0.2)
        assert found["latency"] == pytest.approx(latency, rel=0.2)
