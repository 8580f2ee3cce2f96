"""The modes of the look-ahead: fused into apply, without a master copy, with rates on a device."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.distro import Distro
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
MODES = {
    "fused": {"fused": True},
    "in place": {"master_copy": False},
    "fused in place": {"fused": True, "master_copy": False},
}


def run(modes, *, dtype, steps=5, shapes=SHAPES, read=(), rate=float, backend="auto", skip=()):
    """Train one peer beside its oracle; `read`: steps after which the plain parameters are read."""
    arrays = random_arrays(0, shapes)
    parameters = to_parameters(arrays, dtype)
    distro = Distro(parameters, **SETTINGS, **modes, backend=backend)
    expected = oracles.DistroPeer(arrays, decay=0.9, topk=3, chunk=8, weight_decay=0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    previous, expected_previous, prev_lr = None, None, 0.01
    for step in range(steps):
        lr = 0.01 * (step + 1)
        distro.error_correction(rate(prev_lr))
        ahead = expected.look_ahead(prev_lr)
        assert_parameters(parameters, ahead, doubtful=expected.doubtful, atol=tolerance)
        gradients = random_arrays(1000 + step, shapes)
        set_gradients(parameters, gradients)
        own = distro.generate(previous, rate(prev_lr), rate(lr))
        expected_own = expected.generate(
            [expected_previous] if expected_previous else [], gradients, lr
        )
        if previous and step not in skip:
            distro.apply([previous], rate(lr))
            expected.apply([expected_previous], lr)
        if step in read:
            distro.plain()
            assert_parameters(
                parameters, expected.parameters, doubtful=expected.doubtful, atol=tolerance
            )
        previous, expected_previous, prev_lr = own, expected_own, lr
    distro.plain()
    assert_parameters(parameters, expected.parameters, doubtful=expected.doubtful, atol=tolerance)
    left_out = sum(int(d.sum()) for d in expected.doubtful.values())
    assert left_out <= 0.05 * sum(d.size for d in expected.doubtful.values())
    return parameters


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("read", [(), (1, 2)], ids=["never read", "read between"])
def test_every_mode_follows_the_oracle(mode, read):
    run(MODES[mode], dtype=torch.float64, read=read)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_without_apply_leaves_nothing_undone(mode):
    run(MODES[mode], dtype=torch.float64, skip=(2,))


@pytest.mark.no_gpu
@pytest.mark.parametrize("mode", ["fused", "in place"])
def test_kernels_follow_the_oracle(mode):
    pytest.importorskip("triton")
    shapes = {name: SHAPES[name] for name in ("square", "odd", "experts", "vector", "column")}
    run(MODES[mode], dtype=torch.float32, steps=3, shapes=shapes, backend="interpret")


@pytest.mark.parametrize("mode", ["fused", "in place"])
def test_rates_may_be_tensors(mode):
    def rate(value):
        return torch.tensor(value, dtype=torch.float32)

    run(MODES[mode], dtype=torch.float32, rate=rate)


def test_fused_equals_separate_bit_for_bit_without_weight_decay():
    arrays = random_arrays(3)
    both = []
    for fused in (False, True):
        parameters = to_parameters(arrays, torch.bfloat16)
        distro = Distro(parameters, **{**SETTINGS, "weight_decay": 0.0}, fused=fused)
        previous = None
        for step in range(4):
            distro.error_correction(0.01)
            set_gradients(parameters, random_arrays(step))
            own = distro.generate(previous, 0.01, 0.01)
            if previous:
                distro.apply([previous], 0.01)
            previous = own
        distro.plain()
        both.append(parameters)
    for name, p in both[0].items():
        assert torch.equal(p, both[1][name]), name


def test_in_place_needs_no_copy():
    parameters = to_parameters(random_arrays(0), torch.float32)
    distro = Distro(parameters, **SETTINGS, master_copy=False)
    distro.error_correction(0.1)
    set_gradients(parameters, random_arrays(1))
    distro.generate(None, 0.1, 0.1)
    assert distro._master == []


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
