"""The transform's basis, quantisation, the byte form of indices, and checks of peers' results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from psyche_fast.distro import Distro, DistroResult, quantize_1bit, validate_results
from psyche_fast.distro.chunks import chunk_side, dct_basis
from psyche_fast.kernels.plan import Member, cut_slices
from tests import oracles
from tests.distro.support import random_arrays, set_gradients, to_parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 25, 64])
def test_basis(n):
    basis = dct_basis(n, torch.float64, CPU).numpy()
    np.testing.assert_allclose(basis, oracles.dct_basis(n), atol=1e-15)
    np.testing.assert_allclose(basis.T @ basis, np.eye(n), atol=1e-14)
    np.testing.assert_array_equal(basis == 0, oracles.dct_basis(n) == 0)
    signs = (-1.0) ** np.arange(n)
    np.testing.assert_array_equal(basis[::-1], basis * signs, err_msg="even and odd columns")


@pytest.mark.parametrize("target", [1, 7, 64])
def test_chunk_side(target):
    for n in (1, 2, 6, 7, 49, 64, 67, 96, 106, 128, 1000, 50257):
        assert chunk_side(n, target) == oracles.chunk_side(n, target), n


def test_quantise_keeps_signs():
    values = torch.tensor([[1.5, -2.0, 0.0, -0.0]])
    result = DistroResult(torch.zeros(1, 4, dtype=torch.uint8), values, (1, 8), 8)
    (quantised,) = quantize_1bit([result])
    assert quantised.sparse_val.tolist() == [[False, True, False, False]]
    assert quantised.sparse_idx is result.sparse_idx
    assert quantize_1bit([quantised])[0] is quantised


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 100])
def test_slices_cover_every_chunk_once(limit):
    leads = [(2, 3), (0, 4), (7,), (2, 1, 5)]
    members, start = [], 0
    for position, lead in enumerate(leads):
        count = int(np.prod(lead))
        members.append(Member(position, lead, start, count))
        start += count
    chunks = torch.arange(start)
    covered = []
    for part in cut_slices(members, 6, 6 * limit):
        assert part.stop - part.start <= limit
        for piece in part.pieces:
            member = members[piece.slot]
            own = chunks[member.start : member.start + member.count].view(member.lead)[piece.index]
            assert own.shape == piece.lead
            assert own.reshape(-1).tolist() == list(range(piece.start, piece.stop))
            covered += own.reshape(-1).tolist()
    assert covered == list(range(start))


def test_slices_change_nothing(monkeypatch):
    outcome = []
    for limit in (1 << 25, 200):
        monkeypatch.setattr("psyche_fast.distro.chunks.MAX_SLICE_ELEMENTS_CPU", limit)
        distro, parameters, results = make(torch.float32)
        distro.error_correction(0.1)
        again = distro.generate(results, 0.1, 0.1)
        distro.apply([results, again], 0.1)
        outcome.append((distro, parameters, again))
    (first, p1, r1), (second, p2, r2) = outcome
    assert len(second.layout.plans[0].slices) > len(first.layout.plans[0].slices) == 1
    for name, p in p1.items():
        assert torch.equal(p, p2[name]), name
    for a, b in zip(r1, r2, strict=True):
        assert torch.equal(a.sparse_idx, b.sparse_idx)
        torch.testing.assert_close(a.sparse_val, b.sparse_val)


SHAPES = {"a": (16, 24), "b": (40, 40), "e": (0, 5), "v": (40,)}


def make(dtype=torch.float32, chunk=20):
    parameters = to_parameters(random_arrays(0, SHAPES), dtype)
    distro = Distro(parameters, compression_decay=0.9, compression_chunk=chunk, compression_topk=3)
    set_gradients(parameters, random_arrays(1, SHAPES))
    return distro, parameters, distro.generate(None, 0.1, 0.1)


def test_form_of_results():
    distro, _, (a, b, e, v) = make(torch.bfloat16)
    assert distro.names == ["a", "b", "e", "v"]
    # 16 x 12 = 192 coefficients: one byte; 20 x 20 = 400: two bytes, seen as uint8.
    assert (a.xshape, a.totalk, a.sparse_idx.shape) == ((1, 2, 16, 12), 192, (1, 2, 3))
    assert (b.xshape, b.totalk, b.sparse_idx.shape) == ((2, 2, 20, 20), 400, (2, 2, 6))
    assert (e.xshape, e.totalk, e.sparse_idx.shape) == ((0, 1, 1, 5), 5, (0, 1, 3))
    assert (v.xshape, v.totalk, v.sparse_idx.shape) == ((2, 20), 20, (2, 3))
    for r in (a, b, e, v):
        assert (r.sparse_idx.dtype, r.sparse_val.dtype) == (torch.uint8, torch.bfloat16)
        assert r.sparse_val.shape == (*r.sparse_idx.shape[:-1], 3)
    sent = oracles.compress(0.1 * random_arrays(1, SHAPES)["b"], 20, 3)
    low, high = b.sparse_idx.view(4, 3, 2).to(torch.int64).unbind(-1)
    assert (low + 256 * high).tolist() == [indices for indices, _ in sent]
    np.testing.assert_allclose(
        b.sparse_val.view(4, 3).float().numpy(), [values for _, values in sent], rtol=0.02
    )


def test_indices_of_four_bytes():
    """A 260 x 260 chunk has 67600 coefficients, more than uint16 holds."""
    p = torch.zeros(260, 260, dtype=torch.float64, requires_grad=True)
    basis = torch.tensor(oracles.dct_basis(260))
    coefficients = torch.zeros(260, 260, dtype=torch.float64)
    coefficients[259, 258], coefficients[0, 1] = -2.0, 1.0
    p.grad = basis @ coefficients @ basis.T
    distro = Distro([("p", p)], compression_decay=0.9, compression_chunk=260, compression_topk=2)
    (result,) = distro.generate(None, 1.0, 1.0)
    assert result.sparse_idx.shape == (1, 1, 8)
    assert result.sparse_idx.view(torch.uint32).tolist() == [[[1, 259 * 260 + 258]]]
    distro.apply([[result]], 1.0)
    sure = p.grad.abs() > 1e-9
    assert torch.equal(p.detach()[sure], -p.grad.sign()[sure])


def spoilt(result, **changes):
    return replace(result, **changes)


def with_value(result, value):
    values = result.sparse_val.clone()
    values.view(-1)[-1] = value
    return replace(result, sparse_val=values)


def out_of_range(result):
    index = result.sparse_idx.clone()
    index.view(-1)[-2:] = torch.tensor([400 % 256, 400 // 256], dtype=torch.uint8)
    return replace(result, sparse_idx=index)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda r: spoilt(r, xshape=(4, 1, 20, 20)),
            r"xshape is \(4, 1, 20, 20\), expected \(2, 2",
        ),
        (lambda r: spoilt(r, totalk=401), "totalk is 401, expected 400"),
        (
            lambda r: spoilt(r, sparse_idx=r.sparse_idx.to(torch.int16)),
            "dtype of sparse_idx is torch.int16",
        ),
        (lambda r: spoilt(r, sparse_idx=r.sparse_idx[..., :3]), "shape of sparse_idx"),
        (lambda r: spoilt(r, sparse_val=r.sparse_val[..., :2]), "shape of sparse_val"),
        (
            lambda r: spoilt(r, sparse_val=r.sparse_val.double()),
            "dtype of sparse_val is torch.float64",
        ),
        (out_of_range, "an index is not below totalk 400"),
        (lambda r: with_value(r, float("nan")), "a value is not finite"),
        (lambda r: with_value(r, float("inf")), "a value is not finite"),
    ],
)
def test_faulty_results_are_refused_before_anything_changes(spoil, message):
    distro, parameters, results = make()
    faulty = [results[0], spoil(results[1]), *results[2:]]
    before = {n: p.detach().clone() for n, p in parameters.items()}
    delta = distro.state_dict()["delta"]
    with pytest.raises(ValueError, match=f"peer 1, parameter b: .*{message}"):
        validate_results([results, faulty], distro.layout)
    with pytest.raises(ValueError, match=f"peer 1, parameter b: .*{message}"):
        distro.apply([results, faulty], 0.1)
    with pytest.raises(ValueError, match=f"own result 0, parameter b: .*{message}"):
        distro.generate(faulty, 0.1, 0.1)
    for name, p in parameters.items():
        assert torch.equal(p, before[name])
        assert torch.equal(distro.state_dict()["delta"][name], delta[name])


def test_wrong_number_of_results_and_quantised_own_results_are_refused():
    distro, _, results = make()
    with pytest.raises(ValueError, match="peer 0 sent 3 results, expected one for each of 4"):
        distro.apply([results[:3]], 0.1)
    with pytest.raises(ValueError, match="parameter a: generate wants the unquantised values"):
        distro.generate(quantize_1bit(results), 0.1, 0.1)


def test_bytes_at_any_alignment_and_mixed_peers():
    """Results cut from a buffer at odd offsets; a quantised peer beside one that is not."""
    distro, parameters, results = make()
    buffer = torch.cat([torch.zeros(1, dtype=torch.uint8), results[1].sparse_idx.view(-1)])
    moved = replace(results[1], sparse_idx=buffer[1:].view(results[1].sparse_idx.shape))
    other = [results[0], moved, *results[2:]]
    before = {n: p.detach().clone() for n, p in parameters.items()}
    distro.apply([quantize_1bit(results), other], 0.1)
    for name, r in zip(distro.names, results, strict=True):
        flat = [
            np.frombuffer(i.numpy().tobytes(), np.uint16 if r.totalk > 256 else np.uint8)
            for i in r.sparse_idx.reshape(-1, r.sparse_idx.shape[-1])
        ]
        values = r.sparse_val.reshape(-1, 3).double().tolist()
        plain = [(i.tolist(), v) for i, v in zip(flat, values, strict=True)]
        update = oracles.decode_mean(SHAPES[name], 20, [oracles.signs_only(plain), plain])
        expected = before[name].numpy() - 0.1 * np.sign(update)
        sure = np.abs(update) > 1e-6
        np.testing.assert_allclose(
            parameters[name].detach().numpy()[sure], expected[sure], atol=1e-6
        )
        assert sure.sum() > 0.9 * sure.size or not sure.size


@pytest.mark.parametrize("peers", [1, 7])
def test_an_index_named_twice_counts_with_its_mean(peers):
    """Pairwise merging for few entries, through a dense chunk for many; both beside the oracle."""
    p = torch.zeros(8, 8, dtype=torch.float64, requires_grad=True)
    distro = Distro([("p", p)], compression_decay=0.9, compression_chunk=8, compression_topk=4)
    results, plain = [], []
    generator = np.random.default_rng(0)
    for _ in range(peers):
        indices = generator.choice(6, 4).tolist()
        indices[0] = indices[1]
        values = generator.standard_normal(4).tolist()
        plain.append([(indices, values)])
        results.append(
            [
                DistroResult(
                    torch.tensor(indices, dtype=torch.uint8).view(1, 1, 4),
                    torch.tensor(values, dtype=torch.float64).view(1, 1, 4),
                    (1, 1, 8, 8),
                    64,
                )
            ]
        )
    distro.apply(results, 1.0)
    update = oracles.decode_mean((8, 8), 8, plain)
    np.testing.assert_array_equal(p.detach().numpy(), -np.sign(update))
