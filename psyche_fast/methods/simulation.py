"""`simulate`: several replicas in one process, by the same code as in several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from psyche_fast.methods.exchanges import Arrived, InProcess
from psyche_fast.methods.hierarchy import Hierarchy, Levels, checked_levels
from psyche_fast.methods.method import Method

Gradient = Callable[[int, int, dict[str, Tensor]], Mapping[str, Tensor]]
"""`gradient(replica, step, parameters)`: gradients by name; a name that is missing has none."""


def simulate(
    method: Method | Levels,
    parameters: Mapping[str, Tensor],
    gradient: Gradient,
    *,
    replicas: int,
    steps: int,
    learning_rate: float | Callable[[int], float],
) -> list[dict[str, Tensor]]:
    """The shared parameters after every inner step.

    Messages are packed, checked and unpacked as between processes, whose bits these are. Steps
    count from 0, as in `psyche_fast.schedules`.

    Args:
        method: the method; or levels of a hierarchy, `[(2, dense), (3, sparseloco)]`, of whose
            counts `replicas` is the product.
        parameters: by name, at first; not changed. float64 ones are computed in float64.
        gradient: the gradient of a replica's loss; not clipped here.
        replicas: how many.
        steps: how many inner steps.
        learning_rate: the schedule's, a number or a function of the step (`schedule.get_lr`).

    Returns:
        As many as steps, copies by name; of a hierarchy, what its outermost level shares.

    Raises:
        TypeError: as of `Hierarchy`.
        ValueError: a number out of range, levels that do not go together, or a gradient of no such
            parameter or another shape.
    """
    if replicas < 1 or steps < 0:
        raise ValueError(f"wanted replicas >= 1 and steps >= 0, got {replicas} and {steps}")
    levels = checked_levels([(replicas, method)] if isinstance(method, Method) else method)
    counts = [count for count, _ in levels]
    if replicas != prod(counts):
        raise ValueError(
            f"replicas={replicas} is not the product of the levels' {' x '.join(map(str, counts))}"
        )
    models = [
        {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        for _ in range(replicas)
    ]
    ranks = [Hierarchy(levels, model, rank=number) for number, model in enumerate(models)]
    groups = [list(_groups(counts, at)) for at in range(len(counts))]
    exchanges = [
        [InProcess([ranks[number].levels[at] for number in group]) for group in groups[at]]
        for at in range(len(counts))
    ]
    pending: list[deque[list[Arrived]]] = [deque() for _ in counts]
    path = []
    for step in range(steps):
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        for number, (rank, model) in enumerate(zip(ranks, models, strict=True)):
            rank.before_forward(step)
            _set_gradients(model, gradient(number, step, _values(model)), number)
            rank.local(rate)
        for at in range(len(counts)):
            messages = [rank.send(at) for rank in ranks]
            whole = [message for message in messages if message is not None]
            if whole:
                pending[at].append(
                    [
                        exchange.deliver([whole[number] for number in group])
                        for group, exchange in zip(groups[at], exchanges[at], strict=True)
                    ]
                )
            while ranks[0].due(at):
                for group, arrived in zip(groups[at], pending[at].popleft(), strict=True):
                    for number in group:
                        rank = ranks[number]
                        faults = rank.receive(at, arrived.messages, arrived.leave_out)
                        assert not faults, faults
        path.append({name: p.clone() for name, p in ranks[0].plain().items()})
        for rank in ranks[1:]:
            assert all(torch.equal(p, path[-1][name]) for name, p in rank.plain().items())
    return path


def _groups(counts: list[int], at: int) -> Iterator[list[int]]:
    """Ranks that exchange what they send at a level: counterparts in its sites."""
    site, whole = prod(counts[:at]), prod(counts[: at + 1])
    for block in range(0, prod(counts), whole):
        for place in range(site):
            yield [block + place + number * site for number in range(counts[at])]


def _values(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.items()}


def _set_gradients(
    model: Mapping[str, Tensor], gradients: Mapping[str, Tensor], replica: int
) -> None:
    for name in gradients:
        if name not in model:
            raise ValueError(f"the gradient of replica {replica} has no such parameter: {name}")
    for name, p in model.items():
        found = gradients.get(name)
        if found is not None and found.shape != p.shape:
            raise ValueError(
                f"the gradient of replica {replica} for {name}: wanted {list(p.shape)}, got "
                f"{list(found.shape)}"
            )
        p.grad = None if found is None else found.detach().to(p.dtype, copy=True)
