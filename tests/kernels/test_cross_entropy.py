"""Cross-entropy of rows of logits, and its gradient in their place, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from psyche_fast.batch import IGNORE
from psyche_fast.kernels.cross_entropy import cross_entropy

# Relative, of the loss, and of gradients where they are stored.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def drawn(rows, size, dtype, device, *, scale=1.0):
    generator = torch.Generator().manual_seed(rows + size)
    logits = (scale * torch.randn(rows, size, generator=generator)).to(dtype)
    targets = torch.randint(0, size, (rows,), generator=generator)
    return logits.to(device), targets.to(device)


def exact(logits, targets):
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide, targets, reduction="sum", ignore_index=IGNORE)
    loss.backward()
    return loss.detach(), wide.grad


@pytest.fixture(params=["torch", "kernel"])
def which(request, backend):
    return "torch" if request.param == "torch" else backend


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("size", [1, 2, 63, 4096, 5003])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss_and_gradient_are_those_of_float64(size, dtype, scale, device, which):
    logits, targets = drawn(9, size, dtype, device, scale=scale)
    targets[4] = targets[7] = IGNORE
    wanted, slope = exact(logits, targets)
    loss, gradient = cross_entropy(logits.clone(), targets, backend=which)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert abs(float(loss - wanted)) <= 2e-6 * (float(wanted) + 9 * scale)
    assert gradient.dtype in (torch.float32, dtype)
    error = (gradient.double() - slope).abs()
    # What exponents are off by is relative to what is subtracted.
    assert (error <= ROUNDING[gradient.dtype] * slope.abs() + 1e-6 * (1 + scale)).all()
    assert not gradient[[4, 7]].any()


def test_kernels_leave_the_gradient_in_the_logits_memory(device, backend):
    logits, targets = drawn(3, 130, torch.bfloat16, device)
    version = logits._version
    _, gradient = cross_entropy(logits, targets, backend=backend)
    assert gradient.data_ptr() == logits.data_ptr()
    assert logits._version > version


def test_no_gradient_leaves_the_logits_as_they_are(device, backend):
    logits, targets = drawn(3, 4097, torch.bfloat16, device)
    before = logits.clone()
    loss, gradient = cross_entropy(logits, targets, gradient=False, backend=backend)
    assert gradient is None
    assert torch.equal(logits, before)
    wanted, _ = exact(before, targets)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_rows_that_do_not_count_and_no_rows_at_all(device, which):
    logits, targets = drawn(4, 70, torch.float32, device)
    loss, gradient = cross_entropy(logits, torch.full_like(targets, IGNORE), backend=which)
    assert float(loss) == 0.0
    assert not gradient.any()
    loss, gradient = cross_entropy(logits[:0], targets[:0], backend=which)
    assert float(loss) == 0.0
    assert gradient.shape == (0, 70)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_loss(bad, device, which):
    logits, targets = drawn(3, 100, torch.float32, device)
    logits[1, 40] = bad
    loss, _ = cross_entropy(logits, targets, backend=which)
    assert not loss.isfinite()


def test_masked_logits_have_no_share(device, which):
    logits, targets = drawn(3, 5000, torch.float32, device)
    targets.clamp_(max=4095)
    logits[:, 4096:] = float("-inf")
    wanted, slope = exact(logits[:, :4096].clone(), targets)
    loss, gradient = cross_entropy(logits.clone(), targets, backend=which)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    assert not gradient[:, 4096:].any()
    assert (gradient[:, :4096].double() - slope).abs().max() < 1e-6
