"""Messages between replicas: what goes in comes out, and what cannot be right is named."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist

from psyche_fast.distro import DeMo
from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.distro.message import MessageFormat, hash_rows
from psyche_fast.kernels.plan import Entries
from tests.distro.support import SHAPES, random_arrays, to_parameters
from tests.groups import run_ranks

CPU = torch.device("cpu")
HEADER = 56


def layout(shapes=SHAPES, dtype=torch.float32, *, chunk=8, k=3):
    return Layout(
        [
            ParameterLayout.of(name, shape, dtype, CPU, compression_chunk=chunk, compression_topk=k)
            for name, shape in sorted(shapes.items())
        ]
    )


def form(of, *, signs, backend="torch"):
    return MessageFormat(of, [backend] * len(of.plans), signs=signs)


def random_entries(of, seed=0):
    generator = torch.Generator().manual_seed(seed)
    entries = []
    for plan in of.plans:
        order = torch.rand(plan.chunks, plan.totalk, generator=generator).argsort(dim=1)
        index = order[:, : plan.k].sort(dim=1).values.to(plan.index_dtype)
        values = torch.randn(plan.chunks, plan.k, generator=generator).to(plan.dtype)
        entries.append(Entries(index, values, unique=True))
    return entries


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_of_several_peers(dtype, signs):
    of = layout(dtype=dtype)
    message = form(of, signs=signs)
    sent = [random_entries(of, seed) for seed in range(3)]
    rows = torch.stack([message.pack(entries) for entries in sent])
    assert rows.shape == (3, message.size)
    received, faults = message.unpack(rows)
    assert faults == {}
    for at, e in enumerate(received):
        index = torch.cat([peer[at].indices for peer in sent], dim=1)
        values = torch.cat([peer[at].values for peer in sent], dim=1)
        assert torch.equal(e.indices, index)
        assert torch.equal(e.values, values < 0 if signs else values)
        assert not e.unique


@pytest.mark.gpu
def test_checks_are_read_while_the_device_works_on():
    device = torch.device("cuda", torch.cuda.current_device())
    of = Layout(
        [
            ParameterLayout.of(
                "a", (256, 128), torch.float32, device, compression_chunk=64, compression_topk=8
            )
        ]
    )
    message = form(of, signs=True, backend="triton")
    sent = [Entries(e.indices.to(device), e.values.to(device), unique=True)
            for e in random_entries(of)]  # fmt: skip
    rows = torch.stack([message.pack(sent)] * 2)
    message.unpack(rows)  # compiled by now
    unpacking = message.begin_unpack(rows)
    torch.cuda._sleep(2_000_000_000)  # about a second
    received, faults = unpacking.result()
    assert not torch.cuda.current_stream().query(), "waited for what was launched since"
    assert faults == {}
    assert torch.equal(received[0].indices, torch.cat([sent[0].indices] * 2, dim=1))


@pytest.mark.parametrize("k", [4, 8, 32])
def test_size_is_near_the_entropy(k):
    of = layout({"a": (4096, 4096), "b": (256, 64)}, chunk=64, k=k)
    chunks = 4096 + 4
    floor = chunks * (math.log2(math.comb(4096, k)) + k) / 8
    size = form(of, signs=True).size
    assert floor < size < 1.1 * floor


def resealed(row):
    """With a checksum that fits: what a peer that means harm would send."""
    words = row.view(torch.int64)
    words[HEADER // 8 - 1] = hash_rows(words[None, HEADER // 8 :])[0]
    return row


def _magic(row):
    row[0] ^= 1


def _version(row):
    row[4] = 1


def _kind(row):
    row[6] = 16


def _layout(row):
    row[20] ^= 255


def _definition(row):
    row[24:32] = 0


def _payload(row):
    row[HEADER + 5] ^= 4


def _checksum(row):
    row[HEADER - 1] ^= 128


def _not_finite(row):
    row[HEADER : HEADER + 4] = torch.tensor([float("nan")]).view(torch.uint8)
    resealed(row)


def _no_indices(row):
    row[-8 * 20 :] = 0
    resealed(row)


@pytest.mark.no_gpu
def test_kernels_and_reference_understand_each_other():
    of = layout({"a": (32, 24), "b": (40,)})
    reference, kernels = (form(of, signs=True, backend=b) for b in ("torch", "interpret"))
    sent = [random_entries(of, seed) for seed in range(2)]
    rows = torch.stack([reference.pack(entries) for entries in sent])
    assert torch.equal(torch.stack([kernels.pack(entries) for entries in sent]), rows)
    rows[1, HEADER] ^= 1
    for found, wanted in zip(kernels.unpack(rows)[0], reference.unpack(rows)[0], strict=True):
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.values, wanted.values)
    assert kernels.unpack(rows)[1] == reference.unpack(rows)[1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_magic, "magic"),
        (_version, "version 1, wanted 3"),
        (_definition, "definition hash 0, wanted"),
        (_kind, "kind of values 16, wanted 32"),
        (_layout, "layout hash"),
        (_payload, "checksum"),
        (_checksum, "checksum"),
        (_not_finite, "not finite"),
        (_no_indices, "out of order or range"),
    ],
)
def test_what_cannot_be_right_is_left_out_and_named(spoil, said):
    of = layout({"a": (64, 64), "b": (32, 8)})
    message = form(of, signs=False)
    sent = [random_entries(of, seed) for seed in range(3)]
    rows = torch.stack([message.pack(entries) for entries in sent])
    spoil(rows[1])
    received, faults = message.unpack(rows)
    assert list(faults) == [1]
    assert said in faults[1]
    for at, e in enumerate(received):
        index = torch.cat([sent[0][at].indices, sent[2][at].indices], dim=1)
        assert torch.equal(e.indices, index)
    alone, faults = message.unpack(rows[1:2].clone())
    assert alone is None
    assert list(faults) == [0]


def test_any_bytes_are_refused_and_break_nothing():
    of = layout()
    message = form(of, signs=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (50, message.size), dtype=torch.uint8, generator=generator)
    received, faults = message.unpack(rows)
    assert received is None
    assert list(faults) == list(range(50))
    # With a header and a checksum that fit, what is left to find is in the entries.
    rows[:, : HEADER - 8] = message.pack(random_entries(of))[: HEADER - 8]
    for row in rows:
        resealed(row)
    received, faults = message.unpack(rows)
    assert received is None
    assert all("out of order" in what for what in faults.values())


def test_layouts_that_differ_in_a_name_do_not_mix():
    a, b = layout({"a": (16, 16)}), layout({"b": (16, 16)})
    row = form(a, signs=True).pack(random_entries(a))
    _, faults = form(b, signs=True).unpack(row[None])
    assert "layout hash" in faults[0]


def test_messages_of_another_size_are_refused():
    message, rows = form(layout(), signs=True), torch.zeros(2, 48, dtype=torch.uint8)
    for look in (message.faults, message.begin_unpack):
        with pytest.raises(ValueError, match=r"messages: wanted uint8 \[peers, "):
            look(rows)


def _one_lies(rank, count):
    parameters = to_parameters(random_arrays(0), torch.float32)
    optimizer = DeMo(parameters.items(), 0.01, 0.9, 3, 8)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("psyche_fast").addHandler(handler)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    for step in range(3):
        for name, p in parameters.items():
            p.grad = torch.tensor(random_arrays(10 * rank + step)[name]).float()
            if rank == 1 and step == 1 and name == "square":
                optimizer.state[p]["delta"].view(-1)[0] = float("nan")  # memory gone bad
        optimizer.step()
    dist.barrier()
    changed = any(not torch.equal(before[n], p) for n, p in parameters.items())
    return {n: p.detach() for n, p in parameters.items()}, said, changed


@pytest.mark.processes
def test_a_peer_whose_result_is_refused_does_not_stop_the_others():
    results = run_ranks(_one_lies, 3, 3)
    for parameters, said, changed in results:
        assert changed
        refusals = [s for s in said if "refused" in s]
        # What is not finite stays in that peer's delta.
        assert len(refusals) == 2
        assert all("result of peer 1 is refused" in s and "not finite" in s for s in refusals)
        for name, p in parameters.items():
            assert p.isfinite().all()
            assert torch.equal(p, results[0][0][name]), name
