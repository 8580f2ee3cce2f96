"""The optimisers between ranks: what one refuses all refuse, and nothing waits for it."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast import config
from psyche_fast.distro import DeMo
from psyche_fast.distro.exchange import Pending
from psyche_fast.rank.optimizers import DistroOptimizer, make_optimizer
from tests.distro.support import SHAPES, random_arrays, to_parameters
from tests.groups import run_ranks

OPTIONS = config.Optimizer(
    distro=True, weight_decay=0.1, compression_decay=0.9, compression_topk=3, compression_chunk=8,
    distro_quantization=True,
)  # fmt: skip
STEPS = 5
DAMAGED = 2
"""Number of the exchange in which a message is damaged on its way to one receiver."""


class Damage:
    """Flips a bit of the last peer's message at one receiver, once it has arrived."""

    def __init__(self, here: bool, byte: int) -> None:
        self._here, self._byte = here, byte
        self._exchanges: list[Pending] = []
        self._arrive = Pending._synchronize

    def __enter__(self) -> None:
        self._patch = mock.patch.object(Pending, "_synchronize", lambda p: self(p))
        self._patch.start()

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    def __call__(self, pending: Pending) -> None:
        self._arrive(pending)
        if not any(known is pending for known in self._exchanges):
            self._exchanges.append(pending)
            if self._here and len(self._exchanges) == DAMAGED:
                pending._received[0][-1, self._byte] ^= 1


def _warnings() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("psyche_fast").addHandler(handler)
    return said


def _set_gradients(parameters: dict[str, Tensor], seed: int) -> None:
    for name, array in random_arrays(seed).items():
        parameters[name].grad = torch.tensor(array).float()


def _distro(rank: int, replicas: int, receiver: int, byte: int) -> tuple[list[str], list[Tensor]]:
    """Replicas of one rank, or of two that hold the same, as tensor parallelism's norms are."""
    ranks = dist.get_world_size() // replicas
    groups = [dist.new_group(list(range(p, replicas * ranks, ranks))) for p in range(ranks)]
    parameters = to_parameters(random_arrays(0), torch.float32)
    optimizer = make_optimizer(OPTIONS, parameters, groups[rank % ranks])
    said = _warnings()
    with Damage(rank == receiver, byte):
        for step in range(STEPS):
            optimizer.look_ahead(0.01)
            _set_gradients(parameters, 100 * (rank // ranks) + step)
            optimizer.receive()
            optimizer.after_backward(0.01, 0.01, torch.ones(()))
            optimizer.step(0.01)
        optimizer.plain()
        optimizer.settle()
    return said, [p.detach() for p in parameters.values()]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("world", "replicas", "receiver", "byte"),
    [(3, 3, 1, 100), (3, 3, 0, 4), (4, 2, 1, 100)],
    ids=["payload", "header", "two ranks to a replica"],
)
def test_a_result_damaged_on_its_way_to_one_rank_is_left_out_by_all(
    world: int, replicas: int, receiver: int, byte: int
) -> None:
    ranks = run_ranks(_distro, world, replicas, receiver, byte)
    for rank, (said, parameters) in enumerate(ranks):
        assert len(said) == 1, said
        assert said[0].startswith(f"the result of replica {replicas - 1} is refused: ")
        if rank != receiver:
            assert said[0].endswith(f"it has arrived damaged at rank {receiver}")
        for name, mine, first in zip(sorted(SHAPES), parameters, ranks[0][1], strict=True):
            assert torch.equal(mine, first), (rank, name)
    whole = run_ranks(_distro, world, replicas, world, byte)[0]
    assert whole[0] == []
    assert any(not torch.equal(a, b) for a, b in zip(ranks[0][1], whole[1], strict=True))


def _demo(rank: int, everything: bool) -> tuple[list[str], list[Tensor], list[bool]]:
    parameters = to_parameters(random_arrays(0), torch.float32)
    optimizer = DeMo(parameters.items(), 0.01, 0.9, 3, 8)
    said, changes = _warnings(), []
    with Damage(rank == 1, 100):
        for step in range(STEPS):
            before = [p.detach().clone() for p in parameters.values()]
            _set_gradients(parameters, 100 * rank + step)
            if everything and step == 3:
                for p in parameters.values():
                    optimizer.state[p]["delta"].fill_(torch.nan)  # memory that goes bad
            optimizer.step()
            changes.append(
                any(not torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))
            )
    return said, [p.detach() for p in parameters.values()], changes


@pytest.mark.processes
def test_demo_leaves_out_what_one_peer_refuses_and_goes_on_where_nothing_is_left() -> None:
    ranks = run_ranks(_demo, 3, False)
    for rank, (said, parameters, changes) in enumerate(ranks):
        assert len(said) == 1, said
        assert said[0].startswith("DeMo: the result of peer 2 is refused: ")
        assert rank == 1 or said[0].endswith("it has arrived damaged at rank 1")
        assert all(changes)
        assert all(torch.equal(a, b) for a, b in zip(parameters, ranks[0][1], strict=True))
    for said, parameters, changes in run_ranks(_demo, 3, True):
        # What is not finite stays in the deltas: nobody has anything to give any more.
        assert changes == [True, True, True, False, False]
        assert len(said) == 1 + 2 * 3
        assert all(p.isfinite().all() for p in parameters)


def _waits(rank: int) -> list[str]:
    peers = dist.new_group()
    store = dist.distributed_c10d._get_default_store()
    parameters = to_parameters(random_arrays(0), torch.float32)
    optimizer = make_optimizer(OPTIONS, parameters, peers)
    assert isinstance(optimizer, DistroOptimizer)
    said = []
    for step in range(3):
        if rank == 1 and step == 1:
            store.wait(["rank 0 goes on"])
        optimizer.look_ahead(0.01)
        _set_gradients(parameters, step)
        optimizer.after_backward(0.01, 0.01, torch.ones(()))
        if rank == 0 and step == 1:
            # The other replica has not sent this step's: the wait would never end.
            optimizer.receive()
            said.append(f"{len(optimizer._exchange)} under way")
            store.set("rank 0 goes on", "")
        if step:
            optimizer.settle()
            with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError("late")):
                optimizer.receive()
                optimizer.step(0.01)
                said.append("applied")
    optimizer.settle()
    return said


@pytest.mark.processes
def test_agreement_begins_by_itself_and_receive_waits_for_nobody() -> None:
    first, second = run_ranks(_waits, 2)
    assert first == ["2 under way", "applied", "applied"]
    assert second == ["applied", "applied"]
