"""What a run's method costs: state of a rank, bytes of its rounds, time over a link.

Sizes are those of the real messages of the parameters' chunks; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche_fast.config import RunConfig
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.message import MessageFormat
from psyche_fast.distro.shards import own_layouts
from psyche_fast.links import GATHERED_WAYS, Link
from psyche_fast.methods import AdamW, Method, Muon, Nesterov
from psyche_fast.methods.chunked import cut, fragment_names
from psyche_fast.methods.message import Format
from psyche_fast.methods.muon import is_hidden_matrix
from psyche_fast.methods.owners import are_owned
from psyche_fast.methods.traffic import traffic, ways
from psyche_fast.sharding import local_tensor


@dataclass(frozen=True)
class Costs:
    """What exchanges ask of a rank and of its link.

    Attributes:
        every: inner steps until each fragment has had its turn.
        delay: inner steps that an exchange may take before any of them waits for it.
        messages: bytes that this rank hands over in each round of a turn, as metrics count them.
        up: bytes that go from this rank to other replicas in each.
        down: bytes that it receives in each.
        ways: how often something goes from one end of the link to the other in each.
    """

    every: int
    delay: int
    messages: tuple[int, ...]
    up: tuple[int, ...]
    down: tuple[int, ...]
    ways: int

    @property
    def window(self) -> int:
        """Inner steps of a round."""
        return self.every // len(self.messages)

    def exchange_seconds(self, link: Link, ranks: int = 1) -> float:
        """How long the largest round's exchange takes.

        Args:
            link: of a host.
            ranks: of the host, which share it.
        """
        pairs = zip(self.up, self.down, strict=True)
        return max(
            link.seconds(ranks * up, ranks * down, self.ways) if up else 0.0 for up, down in pairs
        )

    def exposed_seconds(self, exchange: float, step: float) -> float:
        """What a round has to wait for an exchange, at so many seconds of a step without it."""
        return max(0.0, exchange - self.delay * step)

    def loss(self, exchange: float, step: float) -> float:
        """Time that a step takes longer on the average, as a share of a step without exchanges."""
        return self.exposed_seconds(exchange, step) / (self.window * step)


def costs_of(run: RunConfig, parameters: Mapping[str, Tensor], method: Method | None) -> Costs:
    """What a run's exchanges cost a rank.

    Args:
        run: of at least two replicas.
        parameters: this rank's trainable ones by name, DTensors where they are sharded.
        method: the run's; None for DisTrO with options of its own.

    Raises:
        ValueError: the method cannot take these parameters.
    """
    replicas = run.parallelism.replicas
    if method is None:
        own = distro_layout(run, parameters)[0]
        signs = run.optimizer.distro_quantization
        size = MessageFormat(own, ["torch"] * len(own.plans), signs=signs).size
        around = (replicas - 1) * size
        return Costs(1, 1, (size,), (around,), (around,), GATHERED_WAYS)
    sent, up, down = [], [], []
    for number, layout in enumerate(layouts(method, parameters)):
        found = traffic(method, layout, replicas)
        up.append(found.up)
        down.append(found.down)
        if are_owned(method, replicas):
            sent.append(found.up)
        else:
            sent.append(Format(method, layout, ["torch"] * len(layout.plans), number).size)
    around = ways(method, replicas)
    return Costs(method.every, method.delay, tuple(sent), tuple(up), tuple(down), around)


def distro_layout(run: RunConfig, parameters: Mapping[str, Tensor]) -> tuple[Layout, list[int]]:
    """Chunks of this rank's parts for DisTrO, and the numbers of those whose chunks are divided."""
    named = dict(sorted(parameters.items()))
    wholes = [
        ParameterLayout.of(
            name, p.shape, p.dtype, torch.device("cpu"),
            compression_chunk=run.optimizer.compression_chunk,
            compression_topk=run.optimizer.compression_topk,
        )
        for name, p in named.items()
    ]  # fmt: skip
    own, shared = own_layouts(list(named.values()), wholes)
    return Layout(own), [at for members in shared.values() for at in members]


def layouts(method: Method, parameters: Mapping[str, Tensor]) -> list[Layout]:
    """How this rank's parts of each fragment are cut."""
    with torch.device("meta"):
        like = {n: torch.empty(p.shape, dtype=_wide(p)) for n, p in parameters.items()}
    found = []
    for names in fragment_names(method, sorted(like)):
        wholes = cut(method, names, [like[n] for n in names]).parameters
        own = own_layouts([parameters[n] for n in names], wholes)[0]
        found.append(Layout(own, transform=method.transform == "dct"))
    return found


def state_bytes(
    method: Method, parameters: Mapping[str, Tensor], replicas: int, *, has_masters: bool
) -> dict[str, int]:
    """What a rank keeps beside parameters and gradients, by kind.

    Args:
        method: whose.
        parameters: as of `costs_of`.
        replicas: how many.
        has_masters: whether narrower parameters have float32 masters.

    Returns:
        "masters"; "shared": the parameters that all replicas have, where the rank's own are others;
        "kept": momentum or feedback; "own": what has been sent and is to be taken out of that;
        "outer" and "inner": of these steps; "owner": feedback of what this rank merges; "flight":
        with `mix="rebase"` what the parameters were when a message was sent. Messages themselves
        are not among it.
    """
    kinds = ("masters", "shared", "kept", "own", "outer", "inner", "owner", "flight")
    found = dict.fromkeys(kinds, 0)
    sizes = {n: local_tensor(p.detach()).numel() * _wide(p).itemsize for n, p in parameters.items()}
    for name, p in parameters.items():
        narrow = p.dtype != _wide(p)
        found["masters"] += sizes[name] if narrow and has_masters else 0
        own = narrow or method.lookahead
        if method.is_local or (own and not (narrow and has_masters)):
            found["shared"] += sizes[name]
        found["outer"] += sizes[name] if isinstance(method.outer, Nesterov) else 0
        if method.what == "gradient":
            found["outer"] += _moments(method.outer, name, p) * sizes[name]
        found["inner"] += _moments(method.inner, name, p) * sizes[name]
    owned = are_owned(method, replicas)
    for plan in (plan for layout in layouts(method, parameters) for plan in layout.plans):
        size = plan.compute_dtype.itemsize
        all_of_it = plan.chunks * plan.totalk * size
        if method.what == "momentum" or method.feedback != "none":
            found["kept"] += all_of_it
        if method.feedback != "none" and method.select != "all":  # of all it is taken out at once
            places = {"random": 8, "topk": plan.index_dtype.itemsize}[method.select]
            found["own"] += plan.chunks * plan.k * (size + places)
        if owned and method.feedback == "sent" and method.select != "random":
            found["owner"] += all_of_it // replicas
    if method.delay and method.mix == "rebase":
        parts = fragment_names(method, sorted(parameters))
        found["flight"] = max(sum(sizes[n] for n in names) for names in parts)
    return found


def _moments(step: object, name: str, p: Tensor) -> int:
    """How many numbers per element an optimiser keeps."""
    if isinstance(step, Muon):
        return 1 if is_hidden_matrix(step, name, p) else 2
    return 2 if isinstance(step, AdamW) else 0


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
