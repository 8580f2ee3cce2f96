"""Gathers in epochs: real ranks, killed in turn, and what those that are left have."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from psyche_fast.rank import members
from psyche_fast.rank.epochs import Epochs, LeftOut, Place
from psyche_fast.rank.handover import Handover
from psyche_fast.rank.members import Epoch, Joiner, Leader, key, put, ranks_of
from psyche_fast.rank.sliced import Ended, Group
from tests.groups import run_processes
from tests.processes import free_port

pytestmark = pytest.mark.processes


def connect(port: int, rank: int) -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )  # fmt: skip


def epochs_of(
    store: dist.TCPStore, rank: int, size: int, most: int, life: str, joins: bool, timeout: float
) -> Epochs:
    place = Place(rank // size, rank % size, size, most, life)
    leader = None
    if rank == 0:
        leader = Leader(store.clone(), size, lambda: {}, lambda line: None)
    return Epochs(store.clone(), place, timeout, leader=leader, joins=joins)


def begin(store: dist.TCPStore, epochs: Epochs, replicas: int) -> None:
    if epochs.rank == 0:
        first = dict.fromkeys(range(replicas), "first")
        done = dict.fromkeys(ranks_of(first, epochs.size), 0)
        put(store, key(0), Epoch(number=0, members=first, done=done))
    epochs.begin()


def content(rank: int, number: int) -> torch.Tensor:
    return torch.full((5,), (17 * rank + number) % 251, dtype=torch.uint8)


def gather_on(
    rank: int, port: int, size: int, replicas: int, deaths: dict[int, list[int]], last: int
) -> list[Any]:
    """Gathers `last` times, each of place and of all; ends where `deaths` says so.

    Returns:
        of each step the seconds, and of each gather the ranks and what came; nothing of one that
        has died or was left out.
    """
    store = connect(port, rank)
    epochs = epochs_of(store, rank, size, replicas, "first", False, 60)
    begin(store, epochs, replicas)
    found = []
    for step in range(last):
        if rank in deaths.get(step, []):
            return []  # the process ends without a word
        began = time.monotonic()
        try:
            same = epochs.gather(content(rank, step))
            number = torch.tensor([step], dtype=torch.uint8)
            everyone = epochs.gather(
                lambda s=same, n=number: n * len(s.result().ranks), everyone=True
            )
            got = [same.result(), everyone.result()]
        except LeftOut:
            return []
        found.append((time.monotonic() - began, [(list(g.ranks), g.rows.tolist()) for g in got]))
        for sender, row in zip(got[0].ranks, got[0].rows, strict=True):
            assert torch.equal(row, content(sender, step))
    epochs.close()
    if rank == 0:
        time.sleep(0.5)  # the store stays until the others have ended
    return found


@pytest.mark.parametrize(
    ("size", "replicas", "deaths", "left"),
    [
        (1, 2, {3: [1]}, [0]),
        # Rank 0's neighbours in the ring go last: others see no closed connection.
        (1, 5, {2: [2], 4: [3], 6: [1]}, [0, 4]),
        (1, 4, {3: [2, 3]}, [0, 1]),
        (2, 3, {3: [3]}, [0, 1, 4, 5]),  # and with it the other rank of its replica
    ],
    ids=["one of two", "one after the other", "two at once", "replicas of two ranks"],
)
def test_those_that_are_left_go_on(
    size: int, replicas: int, deaths: dict[int, list[int]], left: list[int]
) -> None:
    ranks = size * replicas
    found = run_processes(gather_on, (free_port(), size, replicas, deaths, 9), nprocs=ranks)
    for rank in left:
        for step, (seconds, _) in enumerate(found[rank]):
            # 1.5 s at most where the machine is ours: a second of them for the dead to report.
            assert seconds < 4, f"rank {rank} has waited {seconds:.2f} s in step {step}"
        same = [other for other in left if other % size == rank % size]
        for (_, own), (_, other) in zip(found[rank], found[same[0]], strict=True):
            assert own == other
        last_of_same, last_of_all = found[rank][-1][1]
        assert last_of_same[0] == same
        assert last_of_all[0] == left
    for rank in set(range(ranks)) - set(left):
        assert found[rank] == []


def miss_one(rank: int, port: int, missed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Rank 1 loses its connection with a gather that the others have; rank 2 then dies."""
    store = connect(port, rank)
    epochs = epochs_of(store, rank, 1, 3, "first", False, 60)
    whole = Group.all_gather

    def all_gather(self: Group, sent: torch.Tensor, limit: timedelta, number: int | None) -> Any:
        rows, ended = whole(self, sent, limit, number)
        if (rank, number, epochs.epoch) == (1, missed, 0):
            return None, Ended("the connection was lost with its last words")
        return rows, ended

    with mock.patch.object(Group, "all_gather", all_gather):
        begin(store, epochs, 3)
        found = []
        for number in range(1, missed + 4):
            got = epochs.gather(content(rank, number)).result()
            found.append((list(got.ranks), got.rows.tolist()))
            if (rank, number) == (2, missed):
                return found  # the process ends
        epochs.close()
    if rank == 0:
        time.sleep(0.5)
    return found


def test_what_some_have_got_is_handed_to_the_others() -> None:
    """The dead one's last words count, for one of the others has heard them."""
    one, other, dead = run_processes(miss_one, (free_port(), 3), nprocs=3)
    assert one == other
    assert one[:3] == dead
    assert [ranks for ranks, _ in one] == [[0, 1, 2]] * 3 + [[0, 1]] * 3


def lead(rank: int, port: int, times: int) -> tuple[list[int], list[int]]:
    """Welcomes rank 2 as often as it comes, which dies after some steps each time.

    Returns:
        this process's descriptors and threads, each time when it is alone with its peer again.
    """
    members.WINDOW = 0.4
    store = connect(port, rank)
    epochs = epochs_of(store, rank, 1, 3, "first", False, 60)
    begin(store, epochs, 2)
    descriptors, threads, came = [], [], 0
    state = {"a": torch.arange(5.0), "b": torch.tensor(3), "c": torch.zeros(0, 2)}
    step = 0
    while len(descriptors) < times:
        wants = rank == 0 and came == len(descriptors) and store.check([key("join", 2)])
        flag = torch.tensor([step % 7, bool(wants)], dtype=torch.uint8)
        gathered = epochs.gather(flag).result()
        assert gathered.rows[:, 0].eq(step % 7).all(), "all are at the same step"
        if gathered.rows[0, 1]:
            joiner = None
            if wants:
                joiner = Joiner(2, store.get(key("join", 2)).decode(), step + 1)
                store.delete_key(key("join", 2))
            epochs.welcome(Handover(state) if rank == 0 else None, joiner)
            came += 1
        elif came > len(descriptors) and gathered.ranks == [0, 1]:
            time.sleep(0.3)  # until the thread that gathers has looked after old groups
            descriptors.append(len(os.listdir("/proc/self/fd")))
            threads.append(len(os.listdir("/proc/self/task")))
        step += 1
    epochs.close()
    if rank == 0:
        time.sleep(0.5)
    return descriptors, threads


def come_and_go(port: int, life: str) -> None:
    store = connect(port, 2)
    epochs = epochs_of(store, 2, 1, 3, life, True, 60)
    store.set(key("join", 2), life)
    epochs.begin()
    step, state = epochs.admitted.result()
    assert list(state) == ["a", "b", "c"]
    assert torch.equal(state["a"], torch.arange(5.0))
    assert (state["b"], list(state["c"].shape)) == (3, [0, 2])
    for step in range(step, step + 3):  # noqa: B020
        flag = torch.tensor([step % 7, 0], dtype=torch.uint8)
        gathered = epochs.gather(flag).result()
        assert gathered.ranks == [0, 1, 2]
        assert gathered.rows[:, 0].eq(step % 7).all()
    os.kill(os.getpid(), signal.SIGKILL)


def lead_or_come(rank: int, port: int, times: int) -> Any:
    if rank < 2:
        return lead(rank, port, times)
    statuses = []
    for time_ in range(times):  # no process group has been in this one: it may fork
        child = multiprocessing.get_context("fork").Process(
            target=come_and_go, args=(port, f"life {time_}")
        )
        child.start()
        child.join()
        statuses.append(child.exitcode)
    return statuses


def test_a_replica_comes_and_goes() -> None:
    """It has the leader's state each time; 12 epochs leave no descriptor and no thread behind."""
    *leaders, statuses = run_processes(lead_or_come, (free_port(), 6), nprocs=3)
    assert statuses == [-signal.SIGKILL] * 6
    for descriptors, threads in leaders:
        assert max(descriptors[1:]) == descriptors[1], descriptors
        assert max(threads[1:]) == threads[1], threads
