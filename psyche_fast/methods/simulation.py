"""`simulate`: several replicas in one process, by the same code as in several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from psyche_fast.methods.exchanges import Arrived, InProcess
from psyche_fast.methods.method import Method
from psyche_fast.methods.replica import Replica

Gradient = Callable[[int, int, dict[str, Tensor]], Mapping[str, Tensor]]
"""`gradient(replica, step, parameters)`: gradients by name; a name that is missing has none."""


def simulate(
    method: Method,
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
        method: the method.
        parameters: by name, at first; not changed. float64 ones are computed in float64.
        gradient: the gradient of a replica's loss; not clipped here.
        replicas: how many.
        steps: how many inner steps.
        learning_rate: the schedule's, a number or a function of the step (`schedule.get_lr`).

    Returns:
        As many as steps, copies by name.

    Raises:
        ValueError: a number out of range, or a gradient of no such parameter or another shape.
    """
    if replicas < 1 or steps < 0:
        raise ValueError(f"wanted replicas >= 1 and steps >= 0, got {replicas} and {steps}")
    models = [
        {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        for _ in range(replicas)
    ]
    ranks = [
        Replica(method, model, replica=number, replicas=replicas)
        for number, model in enumerate(models)
    ]
    exchange, pending = InProcess(ranks), deque[Arrived]()
    path = []
    for step in range(steps):
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        messages = []
        for number, (rank, model) in enumerate(zip(ranks, models, strict=True)):
            rank.before_forward(step)
            _set_gradients(model, gradient(number, step, _values(model)), number)
            rank.local(rate)
            messages.append(rank.send())
        whole = [message for message in messages if message is not None]
        if whole:
            pending.append(exchange.deliver(whole))
        while ranks[0].due():
            arrived = pending.popleft()
            for rank in ranks:
                faults = rank.receive(arrived.messages, arrived.leave_out)
                assert not faults, faults
        path.append({name: p.clone() for name, p in ranks[0].plain().items()})
        for rank in ranks[1:]:
            assert all(torch.equal(p, path[-1][name]) for name, p in rank.plain().items())
    return path


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
