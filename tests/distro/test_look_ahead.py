"""`DistroStep`: parameters that stay in the look-ahead between steps."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from psyche_fast.distro import Distro, DistroStep, optimizer
from tests import oracles
from tests.distro.support import (
    SHAPES,
    assert_parameters,
    random_arrays,
    set_gradients,
    to_parameters,
)

SETTINGS = {
    "compression_decay": 0.9,
    "compression_topk": 3,
    "compression_chunk": 8,
    "weight_decay": 0.1,
}


def run(*, dtype, steps=5, shapes=SHAPES, read=(), rate=float, backend="auto", skip=()):
    """Train one peer beside its oracle; `read`: steps after which the plain parameters are read."""
    arrays = random_arrays(0, shapes)
    parameters = to_parameters(arrays, dtype)
    tested = DistroStep(parameters, **SETTINGS, backend=backend)
    expected = oracles.DistroPeer(arrays, decay=0.9, topk=3, chunk=8, weight_decay=0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    previous, expected_previous, prev_lr = None, None, 0.01
    for step in range(steps):
        lr = 0.01 * (step + 1)
        tested.look_ahead(rate(prev_lr))
        ahead = expected.look_ahead(prev_lr)
        assert_parameters(parameters, ahead, doubtful=expected.doubtful, atol=tolerance)
        gradients = random_arrays(1000 + step, shapes)
        set_gradients(parameters, gradients)
        own = tested.compress(previous, rate(lr))
        expected_own = expected.generate(
            [expected_previous] if expected_previous else [], gradients, lr
        )
        if previous and step not in skip:
            tested.update(previous, rate(lr))
            expected.apply([expected_previous], lr)
        if step in read:
            tested.plain()
            assert_parameters(
                parameters, expected.parameters, doubtful=expected.doubtful, atol=tolerance
            )
        previous, expected_previous, prev_lr = own, expected_own, lr
    tested.plain()
    assert_parameters(parameters, expected.parameters, doubtful=expected.doubtful, atol=tolerance)
    left_out = sum(int(d.sum()) for d in expected.doubtful.values())
    assert left_out <= 0.05 * sum(d.size for d in expected.doubtful.values())
    return parameters


@pytest.mark.parametrize("read", [(), (1, 2)], ids=["never read", "read between"])
def test_follows_the_oracle(read):
    run(dtype=torch.float64, read=read)


def test_a_step_without_update_leaves_nothing_undone():
    run(dtype=torch.float64, skip=(2,))


@pytest.mark.no_gpu
def test_kernels_follow_the_oracle():
    pytest.importorskip("triton")
    shapes = {name: SHAPES[name] for name in ("square", "odd", "experts", "vector", "column")}
    run(dtype=torch.float32, steps=3, shapes=shapes, backend="interpret")


def test_rates_may_be_tensors():
    run(dtype=torch.float32, rate=lambda value: torch.tensor(value, dtype=torch.float32))


def test_equals_the_plain_order_bit_for_bit_without_weight_decay():
    options = {**SETTINGS, "weight_decay": 0.0}
    both = [to_parameters(random_arrays(3), torch.bfloat16) for _ in range(2)]
    distro, tested = Distro(both[0], **options), DistroStep(both[1], **options)
    results = entries = None
    for step in range(4):
        distro.error_correction(0.01)
        tested.look_ahead(0.01)
        for parameters in both:
            set_gradients(parameters, random_arrays(step))
        before, results = results, distro.generate(results, 0.01, 0.01)
        sent, entries = entries, tested.compress(entries, 0.01)
        if before:
            distro.apply([before], 0.01)
            tested.update(sent, 0.01)
    ahead = {name: p.detach().clone() for name, p in both[1].items()}
    tested.plain()
    assert any(not torch.equal(p, ahead[name]) for name, p in both[1].items())
    for name, p in both[0].items():
        assert torch.equal(p, both[1][name]), name


def test_what_update_has_written_is_not_written_again():
    parameters = to_parameters(random_arrays(0), torch.float32)
    tested = DistroStep(parameters, **SETTINGS)
    tested.look_ahead(0.1)
    set_gradients(parameters, random_arrays(1))
    tested.update(tested.compress(None, 0.1), 0.1)
    with mock.patch.object(optimizer, "lookahead", side_effect=AssertionError("written again")):
        tested.look_ahead(0.1)
        with pytest.raises(AssertionError, match="written again"):
            tested.look_ahead(0.2)


@pytest.mark.parametrize("mode", ["fused", "master_copy"])
def test_there_is_one_mode(mode):
    with pytest.raises(TypeError, match=mode):
        Distro({"p": torch.zeros(4, requires_grad=True)}, **SETTINGS, **{mode: False})


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_with_a_factor_that_is_not_finite_is_refused_and_counted(factor):
    states = []
    for bad in (False, True):
        parameters = to_parameters(random_arrays(0), torch.float32)
        distro = Distro(parameters, **SETTINGS)
        set_gradients(parameters, random_arrays(1))
        distro.generate(None, 0.1, 0.1)
        set_gradients(parameters, random_arrays(2))
        if bad:
            for p in parameters.values():
                p.grad.fill_(float("nan"))
            distro.generate(None, 0.1, 0.1, grad_scale=torch.tensor(factor))
        else:
            for p in parameters.values():
                p.grad = None
            distro.generate(None, 0.1, 0.1)
        assert int(distro.refused) == int(bad)
        states.append((distro.state_dict()["delta"], parameters))
    for name, delta in states[0][0].items():
        assert torch.equal(delta, states[1][0][name])
        assert torch.equal(states[0][1][name], states[1][1][name])
