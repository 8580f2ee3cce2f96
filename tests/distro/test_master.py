"""The master copy in float32: what small steps add up to is not lost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from psyche_fast.distro.distro import Distro
from psyche_fast.distro.optimizer import DistroStep
from tests.groups import run_ranks

SETTINGS = {
    "compression_decay": 0.9,
    "compression_topk": 4,
    "compression_chunk": 16,
    "weight_decay": 0.1,
}
SHAPES = {"a": (32, 16), "b": (3, 20), "c": (40,), "d": ()}
RATE = 2.0**-12  # half a unit in the last place of a bfloat16 of 1/8 is 2^-12; of 1 it is 2^-9


def parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in SHAPES.items()}
    return {n: torch.nn.Parameter(value.to(dtype)) for n, value in values.items()}


def set_gradients(trained: dict[str, Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in trained.values():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


def run(tested: DistroStep, trained: dict[str, Tensor], steps: range, own=None, rate=RATE):  # type: ignore[no-untyped-def]
    """Some steps in the order of the trainer; the entries of the last one."""
    for step in steps:
        tested.look_ahead(rate)
        set_gradients(trained, step)
        results = tested.compress(own, rate)
        if own is not None:
            tested.update(own, rate)
        own = results
    return own


def masters(tested: DistroStep) -> dict[str, Tensor]:
    return tested.state_dict()["master"]


@pytest.mark.parametrize(("backend", "steps"), [("torch", 4), ("interpret", 2)])
def test_parameters_are_the_float32_ones_rounded(backend: str, steps: int) -> None:
    """Bit for bit those of a run in float32 that is given the same results."""
    narrow, wide = parameters(), parameters(torch.float32)
    tested = DistroStep(narrow, **SETTINGS, backend=backend)
    reference = DistroStep(wide, **SETTINGS, backend="torch")
    own = None
    for step in range(steps):
        tested.look_ahead(RATE)
        reference.look_ahead(RATE)
        set_gradients(narrow, step)
        set_gradients(wide, step)
        results = tested.compress(own, RATE)
        reference.compress(own, RATE)
        if own is not None:
            tested.update(own, RATE)
            reference.update(own, RATE)
        own = results
    tested.plain()
    reference.plain()
    for name, p in narrow.items():
        assert torch.equal(p, wide[name].bfloat16())
        kept = masters(tested)[name]
        assert kept.dtype == torch.float32
    assert any(not torch.equal(narrow[n].float(), wide[n]) for n in narrow)


def test_small_updates_are_not_lost() -> None:
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        trained = parameters()
        before = {n: p.detach().clone() for n, p in trained.items()}
        tested = DistroStep(trained, **{**SETTINGS, "weight_decay": 0.0}, master_dtype=dtype)
        run(tested, trained, range(12), rate=2.0**-14)
        tested.plain()
        changed = sum(int((p != before[n]).sum()) for n, p in trained.items())
        moved[dtype] = changed / sum(p.numel() for p in trained.values())
    assert moved[torch.bfloat16] < 0.15
    assert moved[torch.float32] > 3 * moved[torch.bfloat16]


def test_reading_plain_parameters_changes_nothing() -> None:
    """What is more than they hold is kept, also from call to call of Psyche's loop."""
    outcomes = []
    for read in (False, True):
        trained = parameters()
        tested = DistroStep(trained, **SETTINGS)
        own = None
        for step in range(5):
            own = run(tested, trained, range(step, step + 1), own)
            if read:
                tested.plain()
        tested.plain()
        outcomes.append([*trained.values(), *masters(tested).values()])
    trained = parameters()
    distro = Distro(trained, **SETTINGS)
    sent = None
    for step in range(5):
        distro.error_correction(RATE)
        set_gradients(trained, step)
        results = distro.generate([sent] if sent else None, RATE, RATE)
        if sent:
            distro.apply([sent], RATE)
        sent = results
    outcomes.append([*trained.values(), *masters(distro).values()])
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_what_somebody_else_has_changed_counts() -> None:
    trained = parameters()
    tested = DistroStep(trained, **SETTINGS)
    own = run(tested, trained, range(3))
    tested.plain()
    kept = masters(tested)["a"].view(-1)
    with torch.no_grad():
        trained["a"].view(-1)[5] = 7.0
    tested.look_ahead(RATE)
    now = masters(tested)["a"].view(-1)
    place = (now != kept).nonzero().view(-1).tolist()
    assert len(place) == 1
    assert now[place[0]] == 7.0
    assert own is not None


def test_a_state_goes_on_to_the_bit() -> None:
    trained = parameters()
    tested = DistroStep(trained, **SETTINGS)
    own = run(tested, trained, range(3))
    tested.plain()
    state, others = tested.state_dict(), {n: copy.deepcopy(p) for n, p in trained.items()}
    restored = DistroStep(others, **SETTINGS)
    restored.load_state_dict(state)
    for step, p in ((tested, trained), (restored, others)):
        run(step, p, range(3, 6), own)
        step.plain()
    pairs = zip(trained.values(), others.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(masters(tested)[n], masters(restored)[n]) for n in trained)
    bare = DistroStep({n: copy.deepcopy(p) for n, p in trained.items()}, **SETTINGS)
    bare.load_state_dict({"delta": state["delta"]})  # of a run whose masters were bfloat16
    with pytest.raises(ValueError, match="master of parameter e: no such parameter"):
        bare.load_state_dict({**state, "master": {"e": torch.zeros(1)}})
    cut = {**state["master"], "a": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"master of parameter a is cut as \[3\]"):
        bare.load_state_dict({**state, "master": cut})


def test_dtypes_that_are_refused() -> None:
    with pytest.raises(ValueError, match="master_dtype must be"):
        DistroStep(parameters(), **SETTINGS, master_dtype=torch.float16)


def _sharded(rank: int) -> dict[str, dict[str, Tensor]]:
    """A run whose parameters are cut over two ranks, on edges of chunks ("a") and beside them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = {n: p for n, p in parameters().items() if n != "d"}
    trained = {
        n: torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        for n, p in whole.items()
    }
    tested, plain = DistroStep(trained, **SETTINGS), DistroStep(whole, **SETTINGS)
    own, other = None, None
    for step in range(4):
        for distro in (tested, plain):
            distro.look_ahead(RATE)
        set_gradients(whole, step)
        for n, p in trained.items():
            p.grad = distribute_tensor(whole[n].grad, mesh, [Shard(0)])
        results, others = tested.compress(own, RATE), plain.compress(other, RATE)
        if own is not None and other is not None:
            tested.update(own, RATE)
            plain.update(other, RATE)
        own, other = results, others
        if step == 2:
            state = tested.state_dict()
            tested.load_state_dict(state)
            plain.plain()
    tested.plain()
    plain.plain()
    for n, p in trained.items():
        assert torch.equal(p.full_tensor(), whole[n])
    return {"sharded": masters(tested), "whole": masters(plain)}


@pytest.mark.processes
def test_shards_have_the_same_masters() -> None:
    for outcome in run_ranks(_sharded, 2):
        for name, master in outcome["whole"].items():
            assert torch.equal(outcome["sharded"][name], master), name
