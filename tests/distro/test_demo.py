"""`DeMo` against the float64 oracle, alone and between processes, and its state."""

from __future__ import annotations

import copy
import io

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
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"lr": -1.0}, "lr must not be negative"),
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
