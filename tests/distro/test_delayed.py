"""`DisTrO`, the optimiser, against `Distro`'s calls, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from psyche_fast.distro import DisTrO, Distro
from psyche_fast.distro.results import quantize_1bit
from tests.distro.support import SHAPES, random_arrays, set_gradients, to_parameters
from tests.groups import run_ranks

SETTINGS = {"compression_decay": 0.9, "compression_topk": 3, "compression_chunk": 8}
RATES = [0.01, 0.03, 0.02, 0.005, 0.04]


def snapshot(parameters):
    return {n: p.detach().clone() for n, p in parameters.items()}


def by_calls(arrays, gradients, dtype, *, quantize, peers=1, weight_decay=0.1):
    """What `Distro`'s calls make of it at peer 0: look-ahead and plain parameters of each step."""
    runs = [to_parameters(arrays, dtype) for _ in range(peers)]
    distros = [Distro(ps, **SETTINGS, weight_decay=weight_decay) for ps in runs]
    own = [None] * peers
    previous, seen = 0.0, []
    for step, lr in enumerate(RATES):
        ahead = []
        new = []
        for rank, (ps, distro) in enumerate(zip(runs, distros, strict=True)):
            if step:
                distro.error_correction(previous)
            ahead.append(snapshot(ps))
            set_gradients(ps, gradients(rank, step))
            new.append(distro.generate(own[rank], previous, lr))
        results = [quantize_1bit(r) if quantize else r for r in own] if own[0] else []
        for distro in distros:
            if results:
                distro.apply(results, lr)
            else:
                distro.look_ahead(lr)  # does the weight decay that is due
                distro.plain()
        own, previous = new, lr
        seen.append((ahead, snapshot(runs[0])))
    return seen


def gradients_of(rank, step):
    return random_arrays(1000 * (rank + 1) + step)


def take(optimizer, parameters, rank, step, lr):
    """A step; the parameters before it, and the plain ones after it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = snapshot(parameters)
    set_gradients(parameters, gradients_of(rank, step))
    optimizer.step()
    ahead = snapshot(parameters)
    optimizer.eval()
    plain = snapshot(parameters)
    optimizer.train()
    for name, tensor in ahead.items():
        assert torch.equal(tensor, parameters[name]), "train() goes back to the bit"
    return before, plain


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_are_the_calls_of_distro_to_the_bit(quantize, dtype):
    arrays = random_arrays(0)
    parameters = to_parameters(arrays, dtype)
    optimizer = DisTrO(parameters.items(), 1.0, 0.9, 3, 8, 0.1, quantize=quantize)
    expected = by_calls(arrays, gradients_of, dtype, quantize=quantize)
    for step, lr in enumerate(RATES):
        before, plain = take(optimizer, parameters, 0, step, lr)
        ahead, applied = expected[step]
        for name, tensor in before.items():
            assert torch.equal(tensor, ahead[0][name]), (step, name)
            assert torch.equal(plain[name], applied[name]), (step, name)


def _peer(rank, dtype, quantize):
    parameters = to_parameters(random_arrays(0), dtype)
    optimizer = DisTrO(parameters.items(), 1.0, 0.9, 3, 8, 0.1, quantize=quantize)
    seen = [take(optimizer, parameters, rank, step, lr) for step, lr in enumerate(RATES)]
    optimizer.flush()
    return seen, snapshot(parameters), optimizer.data_transmit


@pytest.mark.processes
def test_peers_follow_the_calls_and_share_the_plain_parameters():
    ranks = run_ranks(_peer, 2, torch.float32, True)
    expected = by_calls(random_arrays(0), gradients_of, torch.float32, quantize=True, peers=2)
    for rank, (seen, last, _) in enumerate(ranks):
        for step, (before, plain) in enumerate(seen):
            for name, tensor in before.items():
                assert torch.equal(tensor, expected[step][0][rank][name]), (step, name)
                assert torch.equal(plain[name], expected[step][1][name]), (step, name)
        for name, tensor in last.items():
            assert torch.equal(tensor, ranks[0][1][name]), "flushed alike"
    assert any(not torch.equal(ranks[0][1][n], ranks[0][0][-1][1][n]) for n in SHAPES)
    assert 0 < ranks[0][2] < 3000
