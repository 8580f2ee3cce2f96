"""Who takes part in an elastic run's next epoch, of what its ranks report."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.rank import members
from psyche_fast.rank.handover import Handover, receive
from psyche_fast.rank.members import Epoch, Joiner, Leader, Report, key, put, read_epoch

LIVES = {0: "a", 1: "b", 2: "c"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "WINDOW", 0.2)


class Run:
    """Replicas of two ranks, and rank 0's part in it."""

    def __init__(self) -> None:
        self.store, self.dead, self.told = (
            dist.HashStore(),
            dict[tuple[int, str], str](),
            list[str](),
        )
        self.leader = Leader(self.store, 2, lambda: self.dead, self.told.append)
        self.epoch = Epoch(number=0, members=LIVES, done=dict.fromkeys(range(6), 0))

    def over(self, **changes: Report | None) -> Epoch:
        """What follows where ranks report that they have done all 5 gathers, or else `rankN`."""
        for rank in self.epoch.done:
            report = changes.get(f"rank{rank}", said())
            if report is not None:
                put(self.store, key(self.epoch.number, "report", rank), report)
        self.epoch = self.leader.next(self.epoch)
        written = read_epoch(bytes(self.store.get(key(self.epoch.number))))
        assert written == self.epoch, "what all ranks read"
        return self.epoch


def said(
    done: int = 5, begun: int = 5, late: int | None = None, *, moved: bool = True, has: bool = True
) -> Report:
    return Report(done=done, begun=begun, late=late, moved=moved, has_state=has)


def test_a_replica_of_which_a_rank_is_silent_leaves_with_all_its_ranks() -> None:
    run = Run()
    epoch = run.over(rank3=None, rank4=said(4))
    assert epoch == Epoch(number=1, members={0: "a", 2: "c"}, done={0: 5, 1: 5, 4: 4, 5: 5})
    assert run.told == ["replica 1 is gone (it does not answer); going on with 0, 2"]


def test_one_that_is_known_to_be_dead_leaves_though_it_has_reported() -> None:
    run = Run()
    run.dead[1, "b"] = "rank 2: killed by SIGKILL"
    run.dead[2, "an earlier life"] = "long ago"
    assert run.over().members == {0: "a", 2: "c"}
    assert run.told == ["replica 1 is gone (rank 2: killed by SIGKILL); going on with 0, 2"]


def test_the_one_whose_training_hangs_leaves_not_those_who_waited() -> None:
    run = Run()
    waited = said(4, 5, 5)
    hangs = said(4, 4)
    assert run.over(rank0=waited, rank1=waited, rank2=hangs, rank3=hangs, rank4=waited,
                    rank5=waited).members == {0: "a", 2: "c"}  # fmt: skip


def test_one_that_has_not_got_its_state_yet_is_no_member() -> None:
    assert Run().over(rank4=said(has=False)).members == {0: "a", 1: "b"}


def test_those_who_see_the_store_but_not_each_other_do_not_try_for_ever() -> None:
    run = Run()
    stuck = {f"rank{rank}": said(moved=False) for rank in range(6)}
    assert run.over(**stuck).members == LIVES
    assert run.over(**stuck).members == {0: "a", 1: "b"}
    assert run.over(**stuck).members == {0: "a", 1: "b"}
    assert run.over(**stuck).members == {0: "a"}


def test_without_rank_0s_own_replica_nobody_goes_on() -> None:
    with pytest.raises(RuntimeError, match="a rank of replica 0, which leads, did not answer"):
        Run().over(rank1=None)


def test_a_replica_joins_after_the_gather_that_is_named_unless_it_has_died() -> None:
    run = Run()
    run.leader.admit(Joiner(3, "d", 17), 6)
    assert run.over().joins is None, "not all have come that far"
    run.epoch = Epoch(number=1, members=LIVES, done=dict.fromkeys(range(6), 0))
    epoch = run.over(rank0=said(6))
    assert (epoch.joins, epoch.operation, epoch.members[3]) == (3, 17, "d")
    assert {rank: epoch.done[rank] for rank in (0, 1, 6, 7)} == {0: 6, 1: 5, 6: 6, 7: 6}
    assert read_epoch(bytes(run.store.get(key("admitted", "d")))) == epoch
    dies = Run()
    dies.leader.admit(Joiner(3, "d", 17), 5)
    dies.dead[3, "d"] = "rank 6: exit status 1"
    epoch = dies.over()
    assert (epoch.joins, epoch.members) == (None, LIVES)


@pytest.mark.parametrize("damaged", [None, "a", "b"])
def test_a_state_that_is_damaged_between_replicas_is_refused(damaged: str | None) -> None:
    state = {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor(3)}
    sent: list[Tensor] = []
    assert Handover(state).send(lambda content: sent.append(content.clone())) is None
    assert len(sent) == 2 + len(state)
    if damaged is not None:
        sent[2 + list(state).index(damaged)][1] ^= 4
    parts = iter(sent)

    def take(content: Tensor) -> None:
        content.copy_(next(parts))

    if damaged is not None:
        with pytest.raises(ValueError, match=f"{damaged} has been damaged between replicas"):
            receive(take)
        return
    found, went_wrong = receive(take)
    assert went_wrong is None
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
