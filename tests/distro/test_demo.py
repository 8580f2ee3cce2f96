"""`DeMo` against the float64 oracle, alone and between processes, and its state."""

from __future__ import annotations

import copy
import io
import logging
import math

import pytest
import torch

from psyche_fast.distro import DeMo
from tests import oracles
from tests.distro.support import (
    SHAPES,
    assert_parameters,
    decoded_delta,
    random_arrays,
    set_gradients,
    to_parameters,
)
from tests.groups import run_ranks

SETTINGS = {"compression_decay": 0.9, "compression_topk": 3, "compression_chunk": 8}


def oracle(arrays, weight_decay=0.0):
    return oracles.DeMoPeer(arrays, decay=0.9, topk=3, chunk=8, weight_decay=weight_decay)


def test_follows_the_oracle_on_every_shape():
    arrays = random_arrays(0)
    parameters = to_parameters(arrays)
    optimizer = DeMo(parameters.items(), 0.01, **SETTINGS, weight_decay=0.1)
    expected = oracle(arrays, weight_decay=0.1)
    for step in range(6):
        lr = 0.01 * (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        gradients = random_arrays(100 + step)
        set_gradients(parameters, gradients)
        optimizer.step()
        expected.receive([expected.send(gradients, lr)], lr)
        assert_parameters(parameters, expected.parameters)
        optimizer.flush()
        deltas = {
            n: decoded_delta(optimizer.state[p]["delta"], p.shape) for n, p in parameters.items()
        }
        assert_parameters(deltas, expected.delta)
        for name, p in parameters.items():
            assert torch.equal(p.grad, torch.tensor(gradients[name])), "gradients stay as they are"


def test_float32_follows_the_oracle():
    shapes = {name: SHAPES[name] for name in ("square", "odd", "experts", "vector")}
    arrays = random_arrays(1, shapes)
    parameters = to_parameters(arrays, torch.float32)
    optimizer = DeMo(parameters.values(), 0.01, **SETTINGS)
    expected = oracle(arrays)
    for step in range(5):
        gradients = random_arrays(200 + step, shapes)
        set_gradients(parameters, gradients)
        optimizer.step()
        expected.receive([expected.send(gradients, 0.01)], 0.01)
    assert_parameters(parameters, expected.parameters, atol=1e-6)


def test_groups_have_their_own_rates():
    arrays = random_arrays(2, {"a": (16, 8), "b": (16, 8)})
    parameters = to_parameters(arrays)
    groups = [
        {"params": [parameters["a"]], "lr": 0.5, "weight_decay": 0.1},
        {"params": [parameters["b"]]},
    ]
    optimizer = DeMo(groups, 0.01, **SETTINGS)
    gradients = random_arrays(3, {"a": (16, 8), "b": (16, 8)})
    set_gradients(parameters, gradients)
    optimizer.step()
    for name, lr, weight_decay in (("a", 0.5, 0.1), ("b", 0.01, 0.0)):
        expected = oracle({name: arrays[name]}, weight_decay)
        expected.receive([expected.send(gradients, lr)], lr)
        assert_parameters({name: parameters[name]}, expected.parameters)


def test_a_missing_gradient_is_zero_and_frozen_parameters_stay():
    frozen = torch.ones(8, 8)
    p, twin = (torch.ones(8, 8, requires_grad=True) for _ in range(2))
    twin.grad = torch.zeros(8, 8)
    DeMo([p, frozen], 0.1, weight_decay=0.5).step()
    DeMo([twin], 0.1, weight_decay=0.5).step()
    assert torch.equal(p, twin)
    assert torch.equal(p, torch.full((8, 8), 0.95))
    assert torch.equal(frozen, torch.ones(8, 8))


def test_closure_is_evaluated_first():
    p = torch.ones(8, requires_grad=True)
    optimizer = DeMo([p], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8.0
    assert torch.equal(p.detach(), torch.full((8,), 0.9))


@pytest.mark.parametrize("copier", ["state_dict", "torch.save", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trips_bit_for_bit(copier, dtype):
    shapes = {name: SHAPES[name] for name in ("square", "odd", "vector", "scalar")}
    parameters = to_parameters(random_arrays(4, shapes), dtype)
    optimizer = DeMo(parameters.values(), 0.01, **SETTINGS)
    for step in range(3):
        set_gradients(parameters, random_arrays(300 + step, shapes))
        optimizer.step()
    if copier == "deepcopy":
        twins, other = copy.deepcopy((parameters, optimizer))
    else:
        twins = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        other = DeMo(twins.values(), 0.5, **SETTINGS)
        state = optimizer.state_dict()
        if copier == "torch.save":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            state = torch.load(buffer)
        other.load_state_dict(state)
    for step in range(3):
        for both, run in ((parameters, optimizer), (twins, other)):
            set_gradients(both, random_arrays(400 + step, shapes))
            run.step()
            run.flush()
        for name, p in parameters.items():
            assert torch.equal(p, twins[name]), name
            assert other.state[twins[name]]["delta"].dtype == torch.float32
            assert torch.equal(optimizer.state[p]["delta"], other.state[twins[name]]["delta"]), name


def test_state_of_another_layout_is_refused():
    p = torch.zeros(16, 16, requires_grad=True)
    saved = DeMo([("layer.weight", p)], 0.1, compression_chunk=8).state_dict()
    other = DeMo([("layer.weight", p)], 0.1, compression_chunk=16)
    with pytest.raises(ValueError, match=r"layer\.weight.*\[2, 2, 8, 8\].*\[1, 1, 16, 16\]"):
        other.load_state_dict(saved)


def test_parameters_can_be_added():
    first, second = (torch.zeros(8, 8, requires_grad=True) for _ in range(2))
    optimizer = DeMo([first], 0.1, **SETTINGS)
    first.grad, second.grad = torch.randn(8, 8), torch.randn(8, 8)
    optimizer.step()
    optimizer.flush()
    kept = optimizer.state[first]["delta"].clone()
    optimizer.add_param_group({"params": [second], "lr": 0.2})
    first.grad = None
    optimizer.step()
    optimizer.flush()
    assert second.abs().max().item() == pytest.approx(0.2)
    own = oracles.compress(0.9 * kept[0, 0].double().numpy(), 8, 3)
    sent = torch.tensor(oracles.decode_mean((8, 8), 8, [own]))
    torch.testing.assert_close(
        optimizer.state[first]["delta"][0, 0].double(),
        0.9 * kept[0, 0].double() - sent,
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compression_topk": 0}, "compression_topk must be positive, got 0"),
        ({"compression_chunk": -1}, "compression_chunk must be positive, got -1"),
        ({"compression_decay": 1.0}, "compression_decay must be .* got 1.0"),
        ({"compression_decay": -0.1}, "compression_decay must be .* got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay must be a number and not negative"),
        ({"lr": -1.0}, "lr must be a number and not negative, got -1.0"),
        ({"lr": math.nan}, "lr must be a number and not negative, got nan"),
        ({"lr": torch.tensor(math.inf)}, "lr must be a number and not negative, got inf"),
        ({"weight_decay": math.nan}, "weight_decay must be a number and not negative, got nan"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, interpret; got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DeMo([torch.zeros(4, requires_grad=True)], **{"lr": 0.1, **wrong})


def _demo_worker(rank, count, steps, dtype):
    parameters = to_parameters(random_arrays(5), dtype)
    optimizer = DeMo(parameters.items(), 0.01, **SETTINGS, weight_decay=0.1)
    for step in range(steps):
        set_gradients(parameters, random_arrays(1000 * (rank + 1) + step))
        optimizer.step()
    sent = optimizer.data_transmit, optimizer.data_receive
    return {"parameters": {n: p.detach() for n, p in parameters.items()}, "bytes": sent}


@pytest.mark.processes
def test_two_processes_follow_the_oracle_and_stay_identical():
    steps, arrays = 3, random_arrays(5)
    first, second = run_ranks(_demo_worker, 2, 2, steps, torch.float64)
    peers = [oracle(arrays, weight_decay=0.1) for _ in range(2)]
    for step in range(steps):
        sent = [
            p.send(random_arrays(1000 * (rank + 1) + step), 0.01) for rank, p in enumerate(peers)
        ]
        for p in peers:
            p.receive(sent, 0.01)
    assert_parameters(first["parameters"], peers[0].parameters)
    for name, p in first["parameters"].items():
        assert torch.equal(p, second["parameters"][name]), name
    entries = sum(len(indices) for result in sent[0].values() for indices, _ in result)
    transmitted, received = first["bytes"]
    # 8 bytes of value each, indices in less than a byte, a header.
    assert 8 * entries < transmitted < 9 * entries
    assert received == 2 * transmitted


def _steps(gradients, steps=4, *, make=None):
    """Parameters and delta after steps with these gradients, one list per parameter."""
    parameters = [torch.ones(16, 16, requires_grad=True), torch.ones(16, requires_grad=True)]
    optimizer = (make or (lambda ps: DeMo(ps, 0.1, **SETTINGS)))(parameters)
    for step in range(steps):
        for p, own in zip(parameters, gradients, strict=True):
            p.grad = own[step]
        optimizer.step()
    optimizer.flush()
    return parameters, [optimizer.state[p]["delta"].clone() for p in parameters], optimizer


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_left_out_whole(bad, dtype, caplog):
    """The step is that of no gradient at all, and the later ones those of a run without it."""
    torch.manual_seed(0)
    good = [[torch.randn(shape) for _ in range(4)] for shape in ((16, 16), (16,))]
    without = [[g if i != 1 else None for i, g in enumerate(own)] for own in good]
    spoilt = [[g.clone() for g in own] for own in good]
    spoilt[1][1][3] = bad
    with caplog.at_level(logging.WARNING):
        parameters, deltas, optimizer = _steps(spoilt)
    expected, expected_deltas, _ = _steps(without)
    for one, other in zip([*parameters, *deltas], [*expected, *expected_deltas], strict=True):
        assert torch.equal(one, other)
    assert int(optimizer.refused) == 1
    assert caplog.text.count("was not finite") == 1


def test_large_finite_gradients_are_used():
    parameters, deltas, optimizer = _steps([[torch.full((16, 16), 1e30)] * 4, [None] * 4])
    assert int(optimizer.refused) == 0
    assert deltas[0].isfinite().all()
    assert (parameters[0] < 1).all()


def test_parameters_unfrozen_and_frozen_later():
    first, second = (torch.ones(8, 8) for _ in range(2))
    first.requires_grad_()
    optimizer = DeMo([first, second], 0.1, **SETTINGS)
    for _ in range(2):
        first.grad = torch.randn(8, 8)
        optimizer.step()
    assert torch.equal(second, torch.ones(8, 8))
    saved = copy.deepcopy(optimizer.state_dict())
    second.requires_grad_()
    second.grad = torch.randn(8, 8)
    optimizer.step()
    assert not torch.equal(second, torch.ones(8, 8))
    optimizer.flush()
    kept = optimizer.state[first]["delta"].clone()
    before = first.detach().clone()
    first.requires_grad_(False)
    optimizer.step()
    assert torch.equal(first, before)
    assert torch.equal(optimizer.state[first]["delta"], kept)
    optimizer.load_state_dict(saved)  # of when the second one was frozen
    first.requires_grad_()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_all_frozen_changes_nothing_and_loads():
    p = torch.ones(8, 8)
    optimizer = DeMo([p], 0.1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(p, torch.ones(8, 8))
    p.requires_grad_()
    p.grad = torch.ones(8, 8)
    optimizer.step()
    assert (p < 1).all()


def test_groups_have_their_own_compression():
    """Each group is what an optimiser of its own would make of it."""
    torch.manual_seed(0)
    gradient = torch.randn(32, 32)
    settings = [
        {"compression_topk": 1, "compression_chunk": 8},
        {"compression_topk": 5, "compression_chunk": 8},
        {"compression_topk": 5, "compression_chunk": 32},
    ]
    alone, together = [], []
    for own in settings:
        p = torch.zeros(32, 32, requires_grad=True)
        p.grad = gradient.clone()
        DeMo([p], 0.1, compression_decay=0.9, **own).step()
        alone.append(p)
        q = torch.zeros(32, 32, requires_grad=True)
        q.grad = gradient.clone()
        together.append(q)
    groups = [{"params": [q], **own} for q, own in zip(together, settings, strict=True)]
    DeMo(groups, 0.1, compression_decay=0.9).step()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compression_topk": 0}, "compression_topk must be positive, got 0"),
        ({"compression_chunk": 0}, "compression_chunk must be positive, got 0"),
        ({"compression_decay": 0.5}, "compression_decay is the optimiser's"),
        ({"lr": math.nan}, "lr must be a number"),
        ({"weight_decay": -1.0}, "weight_decay must"),
    ],
)
def test_wrong_settings_of_groups_are_named(wrong, message):
    p, q = (torch.zeros(4, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        DeMo([{"params": [p], **wrong}], 0.1)
    optimizer = DeMo([p], 0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], **wrong})
    optimizer.step()
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_and_rates_that_become_nan_are_refused():
    embedding = torch.nn.Embedding(8, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = DeMo(embedding.named_parameters(), 0.1)
    with pytest.raises(TypeError, match=r"parameter weight has a sparse gradient.*sparse=False"):
        optimizer.step()
    embedding.weight.grad = None
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be a number"):
        optimizer.step()
    with pytest.raises(ValueError, match="cycle_momentum"):
        torch.optim.lr_scheduler.OneCycleLR(DeMo([embedding.weight], 0.1), 0.1, total_steps=4)
