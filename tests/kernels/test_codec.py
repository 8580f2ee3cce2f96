"""Results as bytes: kernel and twin against each other and a plain reading of the format."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.plan import Entries

pytest.importorskip("triton")

SETTINGS = settings(
    max_examples=16,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHAPES = [(64, 64), (1, 64), (50, 50), (1, 1), (3, 5), (16, 17), (300, 300)]


def make_plan(h, w, k, chunks, device, dtype=torch.float32):
    """A class of `chunks` chunks `h x w`, from one matrix one chunk wide."""
    layout = ParameterLayout.of(
        "p", torch.Size((chunks * h, w)), dtype, device,
        compression_chunk=max(h, w), compression_topk=k,
    )  # fmt: skip
    plan = Layout([layout]).plans[0]
    if (plan.h, plan.w) == (h, w):
        return plan
    # A height whose multiple has a larger divisor is asked for through a stack of matrices.
    layout = ParameterLayout.of(
        "p", torch.Size((chunks, h, w)), dtype, device,
        compression_chunk=max(h, w), compression_topk=k,
    )  # fmt: skip
    plan = Layout([layout]).plans[0]
    assert (plan.h, plan.w, plan.chunks) == (h, w, chunks)
    return plan


def make_entries(plan, rng, kind=torch.float32):
    rows = [sorted(rng.sample(range(plan.totalk), plan.k)) for _ in range(plan.chunks)]
    indices = torch.tensor(rows, dtype=torch.int64).view(plan.chunks, plan.k)
    if kind == torch.bool:
        values = torch.tensor([rng.random() < 0.5 for _ in range(indices.numel())])
    else:
        values = torch.tensor([rng.choice((-2.0, -0.0, 0.0, 1.5)) for _ in range(indices.numel())])
    values = values.view(indices.shape).to(kind)
    return Entries(indices.to(plan.index_dtype).to(plan.device), values.to(plan.device), True)


def read_chunk(plan, data, values, chunk):
    """Indices, signs and well-formedness of a chunk, bit by bit from the format's description."""
    code = wire.index_code(plan.totalk, plan.k)
    bits = code.bits + (plan.k if values == "sign" else 0)
    head = 0 if values == "sign" else plan.chunks * plan.k * values.itemsize
    plane = [data[head + (chunk // 8) * bits + b] >> (chunk % 8) & 1 for b in range(bits)]
    if code.bits == 0:
        return list(range(plan.k)), plane, True
    low = [
        sum(plane[i * code.low + j] << j for j in range(code.low)) for i in range(plan.k)
    ]  # fmt: skip
    ones = [p for p in range(code.upper) if plane[plan.k * code.low + p]]
    indices, fine = [0] * plan.k, len(ones) == plan.k
    for i, position in enumerate(ones[: plan.k]):
        indices[i] = ((position - (i if code.gap else 0)) << code.low) | low[i]
        fine = fine and indices[i] < plan.totalk and (i == 0 or indices[i - 1] < indices[i])
        indices[i] = indices[i] if indices[i] < plan.totalk else plan.totalk - 1
    return indices, plane[code.bits :], fine


def draw_plan(data, device):
    h, w = data.draw(st.sampled_from(SHAPES))
    # Few; a word's bits and one; all or, of many, several words; one.
    k = min(data.draw(st.sampled_from([8, 33, 300 if h * w < 300 else 70, 1])), h * w)
    return make_plan(h, w, k, data.draw(st.integers(1, 20)), device)


@SETTINGS
@given(data=st.data())
def test_round_trips_and_equal_bytes(data, device, backend):
    plan = draw_plan(data, device)
    rng = random.Random(data.draw(st.integers(0, 99)))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.bool]))
    values = "sign" if kind == torch.bool else data.draw(st.sampled_from(["sign", kind]))
    entries = make_entries(plan, rng, kind)
    sent = wire.pack(plan, entries, values, backend=backend)
    assert sent.dtype == torch.uint8
    assert len(sent) == wire.size(plan, values)
    assert torch.equal(sent, wire.pack(plan, entries, values))
    expected = entries.values
    if values == "sign":
        expected = entries.values if kind == torch.bool else entries.values < 0
    for name in ("torch", backend):
        got, valid = wire.unpack_checked(plan, sent, values, backend=name)
        assert got.unique
        assert got.indices.dtype == plan.index_dtype
        assert torch.equal(got.indices.to(torch.int64), entries.indices.to(torch.int64))
        assert got.values.dtype == expected.dtype
        assert torch.equal(got.values, expected)
        assert valid.shape == (plan.chunks,)
        assert valid.all()
        plain = wire.unpack(plan, sent, values, backend=name)
        assert torch.equal(plain.indices.to(torch.int64), got.indices.to(torch.int64))
    raw = sent.tolist()
    for chunk in {0, plan.chunks // 2, plan.chunks - 1}:
        indices, signs, fine = read_chunk(plan, raw, values, chunk)
        assert indices == entries.indices[chunk].to(torch.int64).tolist()
        assert fine
        if values == "sign":
            assert signs == expected[chunk].int().tolist()


@SETTINGS
@given(data=st.data())
def test_bytes_of_any_content_are_read_the_same_way(data, device, backend):
    plan = draw_plan(data, device)
    values = data.draw(st.sampled_from(["sign", torch.float32]))
    rng = random.Random(data.draw(st.integers(0, 99)))
    entries = make_entries(plan, rng)
    good = bytearray(wire.pack(plan, entries, values).cpu().numpy().tobytes())
    if data.draw(st.booleans()):
        for _ in range(3):  # as a line that flips bits would
            good[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        peers = [bytes(good)]
    else:
        peers = [rng.randbytes(len(good)), bytes(len(good)), b"\xff" * len(good)]
    received = torch.tensor([list(p) for p in peers], dtype=torch.uint8, device=device)
    results = {}
    for name in ("torch", backend):
        got, valid = wire.unpack_checked(plan, received, values, backend=name)
        indices = got.indices.to(torch.int64)
        assert int(indices.max()) < plan.totalk
        assert valid.shape == (len(peers), plan.chunks)
        results[name] = indices.view(plan.chunks, len(peers), plan.k), got.values, valid
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    indices, numbers, valid = results[backend]
    for peer, raw in enumerate(peers):
        for chunk in range(plan.chunks):
            expected, signs, fine = read_chunk(plan, raw, values, chunk)
            own = numbers.view(indices.shape)[chunk, peer]
            if values == "sign":
                assert own.int().tolist() == signs
            else:
                fine = fine and bool(own.isfinite().all())
            assert indices[chunk, peer].tolist() == expected
            assert bool(valid[peer, chunk]) == fine


@pytest.mark.parametrize(("k", "bits"), [(4, 51), (8, 95), (32, 319)])
def test_bits_are_near_the_entropy_floor(k, bits):
    plan = make_plan(64, 64, k, 8, torch.device("cpu"))
    floor = math.log2(math.comb(4096, k)) + k
    assert 8 * wire.size(plan, "sign") == bits * plan.chunks
    assert bits <= 1.1 * floor


def test_sizes():
    device = torch.device("cpu")
    assert wire.size(make_plan(64, 64, 8, 3, device), "sign") == 95, "a started group is whole"
    assert wire.size(make_plan(64, 64, 8, 9, device), "sign") == 190
    assert wire.size(make_plan(64, 64, 8, 8, device), torch.bfloat16) == 87 + 8 * 8 * 2
    # Where everything is kept no index is sent.
    assert wire.size(make_plan(3, 5, 15, 8, device), "sign") == 15
    assert wire.size(make_plan(3, 5, 15, 8, device), torch.float32) == 8 * 15 * 4


@pytest.mark.parametrize("totalk", [2, 15, 256, 4096, 65537])
def test_the_code_is_never_longer_than_indices_or_a_bitmap(totalk):
    for k in {1, 2, totalk // 4, totalk // 2, totalk - 1, totalk} - {0}:
        code = wire.index_code(totalk, k)
        # One bit more than plain indices at most, where a single one is kept.
        assert code.bits <= min(k * (totalk - 1).bit_length() + k, totalk)


@pytest.mark.parametrize("values", ["sign", torch.float32])
def test_no_chunks(values, device, backend):
    plan = make_plan(4, 4, 2, 1, device)
    empty = Layout([
        ParameterLayout.of(
            "p", torch.Size((0, 4, 4)), torch.float32, device,
            compression_chunk=4, compression_topk=2,
        )
    ]).plans[0]  # fmt: skip
    nothing = Entries(
        torch.empty(0, 2, dtype=plan.index_dtype, device=device),
        torch.empty(0, 2, device=device),
        unique=True,
    )
    sent = wire.pack(empty, nothing, values, backend=backend)
    assert sent.shape == (0,)
    got, valid = wire.unpack_checked(empty, sent.view(1, 0).expand(3, 0), values, backend=backend)
    assert got.indices.shape == (0, 6)
    assert got.values.shape == (0, 6)
    assert valid.shape == (3, 0)


@pytest.mark.parametrize("values", ["sign", torch.bfloat16])
def test_peers_side_by_side_from_the_middle_of_buffers(values, device, backend):
    """Each peer's bytes at an odd address of a longer row, as in a bucket of several classes."""
    plan = make_plan(64, 64, 8, 13, device)
    size = wire.size(plan, values)
    everyone = [make_entries(plan, random.Random(seed)) for seed in range(3)]
    bucket = torch.full((3, size + 12), 255, dtype=torch.uint8, device=device)
    for row, entries in zip(bucket, everyone, strict=True):
        out = wire.pack(plan, entries, values, out=row[5 : 5 + size], backend=backend)
        assert out.data_ptr() == row[5:].data_ptr()
    assert (bucket[:, :5] == 255).all()
    assert (bucket[:, 5 + size :] == 255).all()
    for name in ("torch", backend):
        got = wire.unpack(plan, bucket[:, 5 : 5 + size], values, backend=name)
        assert not got.unique
        indices = torch.cat([e.indices.to(torch.int64) for e in everyone], dim=1)
        assert torch.equal(got.indices.to(torch.int64), indices)
        numbers = torch.cat([e.values for e in everyone], dim=1)
        assert torch.equal(got.values, numbers < 0 if values == "sign" else numbers.to(values))


def test_entries_that_are_columns_of_others(device, backend):
    plan = make_plan(16, 16, 4, 9, device)
    one, two = (make_entries(plan, random.Random(seed)) for seed in (1, 2))
    both = Entries(torch.cat([one.indices, two.indices], 1), torch.cat([one.values, two.values], 1))
    half = Entries(both.indices[:, 4:], both.values[:, 4:], unique=True)
    for name in ("torch", backend):
        sent = wire.pack(plan, half, "sign", backend=name)
        assert torch.equal(sent, wire.pack(plan, two, "sign"))


def test_each_fault_is_found_in_its_chunk(device, backend):
    plan = make_plan(50, 50, 4, 10, device)  # 2500 is no power of two: some indices do not exist
    code = wire.index_code(2500, 4)
    assert (code.low, code.gap, code.upper) == (9, 1, 8)
    entries = make_entries(plan, random.Random(0))
    rows = entries.indices.to(torch.int64)
    rows[3] = torch.tensor([5, 512, 600, 2499])
    rows[5] = torch.tensor([5, 512, 513, 2499])
    entries = Entries(rows.to(plan.index_dtype), entries.values, unique=True)
    first = code.k * code.low  # the bit vector

    def flipped(chunk, *bits):
        data = wire.pack(plan, entries, "sign")
        planes = data.view(2, -1)
        for bit in bits:
            planes[chunk // 8, bit] ^= 1 << (chunk % 8)
        return data

    faults = {
        "one bit too many": flipped(3, first + 1),
        "one bit too few": flipped(3, first),
        "equal indices": flipped(5, 2 * code.low),  # 513 -> 512
        "descending indices": flipped(3, code.low + 8),  # 512 -> 768 before 600
        "index that does not exist": flipped(3, 3 * code.low + 5),  # 2499 + 32
    }
    for what, data in faults.items():
        wrong = 5 if what == "equal indices" else 3
        for name in ("torch", backend):
            got, valid = wire.unpack_checked(plan, data, "sign", backend=name)
            assert valid.logical_not().nonzero().flatten().tolist() == [wrong], what
            assert int(got.indices.to(torch.int64).max()) < 2500


def test_values_that_are_not_finite_are_found(device, backend):
    plan = make_plan(8, 8, 2, 4, device)
    entries = make_entries(plan, random.Random(0))
    entries.values[2, 1] = torch.nan
    entries.values[3, 0] = 1e38  # infinite once in float16
    sent = wire.pack(plan, entries, torch.float16, backend=backend)
    _, valid = wire.unpack_checked(plan, sent, torch.float16, backend=backend)
    assert valid.tolist() == [True, True, False, False]


def test_mistakes_are_named(device, backend):
    plan = make_plan(8, 8, 2, 4, device)
    entries = make_entries(plan, random.Random(0))
    signs = make_entries(plan, random.Random(0), torch.bool)
    size = wire.size(plan, "sign")
    with pytest.raises(TypeError, match=r"values: wanted 'sign' or a floating-point dtype, got"):
        wire.size(plan, torch.int8)
    with pytest.raises(TypeError, match="got signs alone"):
        wire.pack(plan, signs, torch.float32, backend=backend)
    out = torch.empty(3, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=rf"out: wanted contiguous uint8 \[{size}\]"):
        wire.pack(plan, entries, "sign", out=out, backend=backend)
    with pytest.raises(ValueError, match=r"indices: wanted shape \[4, 2\], got \[4, 1\]"):
        wire.pack(plan, Entries(entries.indices[:, :1], entries.values), "sign", backend=backend)
    with pytest.raises(ValueError, match=r"indices: wanted torch.uint8, got torch.int64"):
        wire.pack(plan, Entries(entries.indices.to(torch.int64), entries.values), "sign")
    away = Entries(entries.indices.to("meta"), entries.values.to("meta"))
    with pytest.raises(ValueError, match=f"indices: wanted a tensor on {device}, got meta"):
        wire.pack(plan, away, "sign", backend=backend)
    out = torch.empty(size, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=f"out: wanted a tensor on {device}, got meta"):
        wire.pack(plan, entries, "sign", out=out, backend=backend)
    data = wire.pack(plan, entries, "sign", backend=backend)
    with pytest.raises(ValueError, match=f"data: wanted a tensor on {device}, got meta"):
        wire.unpack(plan, data.to("meta"), "sign", backend=backend)
    with pytest.raises(ValueError, match=rf"data: wanted uint8 \[{size}\] or \[peers, {size}\]"):
        wire.unpack(plan, data[1:], "sign", backend=backend)
    with pytest.raises(ValueError, match="data: wanted contiguous rows"):
        wire.unpack(plan, data.repeat_interleave(2)[::2], "sign", backend=backend)
