"""`--link`: what the links between a run's replicas carry, and settings that fit them.

Measured is what replicas' exchanges have to go through: messages between the first ranks of all
replicas, over gloo, all at the same time and both ways. A second or two for each of at most two
patterns; it ends when the rate no longer grows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.links import Link
from psyche_fast.models import CausalLM
from psyche_fast.models.source import vocabulary_size
from psyche_fast.rank.choice import Place, choose, chosen, table
from psyche_fast.rank.gradients import drop_gradients
from psyche_fast.rank.topology import Topology
from psyche_fast.start.probe import PIECES, PINGS, Pace, arrivals

AUTO = "auto"
_PATTERNS = 2
_SAID_BYTES = 1 << 14


@dataclass(frozen=True)
class Settled:
    """What all ranks have been told.

    Attributes:
        changes: options of the run by name, `link` among them.
        measured: of the link and of a step, for the run's metrics.
        lines: for the user.
    """

    changes: dict[str, Any]
    measured: dict[str, float]
    lines: list[str]


def measure(group: dist.ProcessGroup) -> list[Link]:
    """The link of each rank of a gloo group, in their order; the same on all, which all call it.

    Up is the most that went from a rank to another one, down what came to it, in two patterns:
    to the next rank, and where there are more than two, across the ring. What one rank alone
    cannot fill is not seen.
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    latencies = [latency for (latency,) in _gathered([_latency(group, ranks, me)], group)]
    up, down = [0.0] * ranks, [0.0] * ranks
    for shift in sorted({1, ranks // 2})[:_PATTERNS]:
        for sender, rate in enumerate(_rates(group, ranks, me, shift)):
            receiver = (sender + shift) % ranks
            up[sender], down[receiver] = max(up[sender], rate), max(down[receiver], rate)
    return [Link(*numbers) for numbers in zip(up, down, latencies, strict=True)]


def _gathered(numbers: Sequence[float], group: dist.ProcessGroup) -> list[list[float]]:
    own = torch.tensor(numbers, dtype=torch.float64)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return [[float(number) for number in row] for row in found]


def _latency(group: dist.ProcessGroup, ranks: int, me: int) -> float:
    """Seconds of one way between this rank and the next."""
    following, before = (me + 1) % ranks, (me - 1) % ranks
    byte = torch.zeros(1, dtype=torch.uint8)
    # A receive that is there already: what is sent goes at once.
    pings = [_receive(byte.clone(), before, group, n) for n in range(PINGS)]
    pongs = [_receive(byte.clone(), following, group, PINGS + n) for n in range(PINGS)]
    _gathered([0.0], group)
    trips = []
    for n in range(PINGS):
        began = time.perf_counter()
        sent = [_send(byte, following, group, n)]
        pings[n].wait()
        sent.append(_send(byte, before, group, PINGS + n))
        pongs[n].wait()
        trips.append(time.perf_counter() - began)
        for work in sent:
            work.wait()
    return min(trips) / 2


def _rates(group: dist.ProcessGroup, ranks: int, me: int, shift: int) -> list[float]:
    """Bits in a second from each rank to the one `shift` after it, all at the same time."""
    paces = [Pace() for _ in range(ranks)]  # those of all, known to all
    while any(pace.size for pace in paces):
        pieces = [max(pace.size // PIECES, 1) for pace in paces]
        source = (me - shift) % ranks
        into = torch.empty(pieces[source], dtype=torch.uint8)
        arriving = [
            _receive(into, source, group, n) for n in range(PIECES if paces[source].size else 0)
        ]
        _gathered([0.0], group)
        began, times = time.perf_counter(), []
        content = torch.zeros(pieces[me], dtype=torch.uint8)
        target = (me + shift) % ranks
        sent = [_send(content, target, group, n) for n in range(PIECES if paces[me].size else 0)]
        for work in arriving:
            work.wait()
            times.append(time.perf_counter())
        for work in sent:
            work.wait()
        own = arrivals(began, times, pieces[source]) if times else (0.0, 0.0)
        for receiver, found in enumerate(_gathered(own, group)):
            pace = paces[(receiver - shift) % ranks]
            if pace.size:
                pace.took(*found)
    return [pace.rate for pace in paces]


def _send(tensor: Tensor, to: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    work = dist.isend(tensor, group=group, group_dst=to, tag=tag)
    assert work is not None
    return work


def _receive(into: Tensor, source: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    work = dist.irecv(into, group=group, group_src=source, tag=tag)
    assert work is not None
    return work


def step_seconds(model: CausalLM, topology: Topology, run: RunConfig) -> float:
    """Seconds of a step's forward and backward: a second micro-batch of random tokens, times many.

    Nothing of it stays: gradients, buffers and random numbers are what they were. What the
    optimiser takes is not in it, so that a step hides rather more than it says.
    """
    device, rows = model.device, run.training.micro_batch * topology.dp
    cuda = [device] if device.type == "cuda" else []
    buffers = [(b, b.clone()) for b in model.module.buffers()]
    with torch.random.fork_rng(devices=cuda, device_type="cuda" if cuda else "cpu"):
        seconds, generator = 0.0, torch.Generator().manual_seed(0)  # the same on all slices
        model.train()
        for _ in range(2):
            size = (rows, run.model.sequence_length)
            tokens = torch.randint(vocabulary_size(model.config) or 2, size, generator=generator)
            batch = model.prepare(Batch(tokens)).share(topology.shard, topology.dp)
            began = _now(device)
            model.loss(batch).backward()
            seconds = _now(device) - began
            drop_gradients(model.named_parameters().values())
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    own = -(-run.run.total_batch // run.parallelism.replicas)
    return seconds * -(-own // rows)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def settle(
    run: RunConfig, model: CausalLM, parameters: Mapping[str, Tensor], topology: Topology
) -> Settled:
    """Settings for the link that `--link` gives or has measured; a collective of all ranks.

    Rank 0 chooses, and all take what it says.

    Raises:
        ValueError: options that do not go together.
    """
    world = dist.get_world_size()
    everyone = dist.new_group(backend="gloo")
    firsts = dist.new_group(list(range(0, world, topology.dp * topology.tp)), backend="gloo")
    assert isinstance(everyone, dist.ProcessGroup)
    links: list[Link] = []
    if run.exchange.link != AUTO:
        links = [Link.parse(str(run.exchange.link))]
    elif topology.is_first:
        assert isinstance(firsts, dist.ProcessGroup)
        links = measure(firsts)
    dist.barrier(everyone)
    slowest = max(_gathered([step_seconds(model, topology, run)], everyone))[0]
    told = torch.zeros(_SAID_BYTES, dtype=torch.uint8)
    if dist.get_rank() == 0:
        told = _packed(_settled(run, parameters, links, slowest, topology))
    dist.broadcast(told, group=everyone, group_src=0)
    return msgspec.json.decode(told.numpy().tobytes().rstrip(b" \0"), type=Settled)


def _packed(settled: Settled) -> Tensor:
    packed = msgspec.json.encode(settled).ljust(_SAID_BYTES)
    assert len(packed) == _SAID_BYTES, "a table of a few lines"
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _settled(
    run: RunConfig,
    parameters: Mapping[str, Tensor],
    links: Sequence[Link],
    step: float,
    topology: Topology,
) -> Settled:
    """What rank 0 tells all."""
    is_measured = run.exchange.link == AUTO
    link = rounded(worst(links)) if is_measured else links[0]
    place = Place(run, parameters, link, step, topology.dp * topology.tp)
    found = choose(place)
    own = [
        f"link     of replica {r}: {rounded(each)}" for r, each in enumerate(links) if is_measured
    ]
    lines = [
        *own,
        f"link     {link} between replicas{'' if is_measured else ', as given'}",
        f"step     {step:.3g} s of compute: a micro-batch of random tokens, times their number",
        *table(place),
        chosen(found),
    ]
    measured = {
        "up": link.up, "down": link.down, "latency": link.latency, "step_seconds": step,
        "exchange_seconds": found.exchange,
    }  # fmt: skip
    said_so = str(link) if is_measured else run.exchange.link
    return Settled({**found.changes, "link": said_so}, measured, lines)


def worst(links: Sequence[Link]) -> Link:
    """What an exchange among all goes by."""
    return Link(
        min(each.up for each in links),
        min(each.down for each in links),
        max(each.latency for each in links),
    )


def rounded(link: Link) -> Link:
    """Three digits of each number, as many as a measurement has."""
    return Link(*(float(f"{n:.3g}") for n in (link.up, link.down, link.latency)))
