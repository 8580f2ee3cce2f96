"""Planning of launches: what is kept, what is refused, where chunks are found."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from psyche_fast.distro.chunks import Layout, ParameterLayout
from psyche_fast.kernels import accumulate as accumulation
from psyche_fast.kernels import pack as wire
from psyche_fast.kernels.apply import apply, lookahead, subtract
from psyche_fast.kernels.encode import encode
from psyche_fast.kernels.plan import Entries
from psyche_fast.kernels.triton import accumulate, launch
from psyche_fast.kernels.triton.launch import planned
from tests import oracles
from tests.kernels.support import CLASSES, Guarded, one_class

HUGE = 1 << 31
"""More elements than a 32-bit offset reaches."""


def random(shapes, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def step(plan, delta, gradients, parameters, backend, **options):
    rates = options.pop("rates", [0.1] * len(parameters))
    entries = encode(plan, delta, gradients, rates, decay=0.9, backend=backend, **options)
    ahead = [torch.empty_like(p) for p in parameters]
    options = {"ahead": ahead, "delta": delta, "backend": backend}
    apply(plan, parameters, entries, rates, **options)
    subtract(plan, delta, entries, backend=backend)
    lookahead(plan, parameters, delta, rates, ahead, backend=backend)
    return entries


@pytest.mark.parametrize(("name", "suffix"), [("64x64", ""), ("1x64", ":0")])
def test_a_device_may_be_named_with_its_index_or_without(name, suffix, device, backend):
    """Tensors name theirs in one way, which plans have to take over."""
    shapes = CLASSES[name]
    named = torch.device(device.type + suffix)
    plan = one_class(shapes, k=4, device=named)
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=named)
    assert plan.device == plan.basis_h.device == delta.device
    parameters = random(shapes, named)
    entries = step(plan, delta, random(shapes, named, 1), parameters, backend)
    data = wire.pack(plan, entries, "sign", backend=backend)
    received = wire.unpack(plan, data, "sign", backend=backend)
    assert torch.equal(received.indices.int(), entries.indices.int())
    apply(plan, parameters, received, [0.1] * len(shapes), backend=backend)


def test_parameters_of_one_device_form_one_class(device):
    """However each names it."""
    layouts = [
        ParameterLayout.of(
            name, (64, 64), torch.float32, torch.device(name),
            compression_chunk=64, compression_topk=4,
        )
        for name in (device.type, f"{device.type}:0")
    ]  # fmt: skip
    assert len(Layout(layouts).plans) == 1


@pytest.mark.parametrize("name", ["64x64", "1x64"])
def test_planning_is_done_once(name, device, backend, monkeypatch):
    """The same tensors again need no table, no upload, no scratch memory."""
    shapes = CLASSES[name]
    plan = one_class(shapes, k=4, device=device)
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    gradients, parameters, ahead = (random(shapes, device, seed) for seed in range(3))
    rates = [0.1 * (1 + i) for i in range(len(shapes))]

    def run():
        entries = encode(plan, delta, gradients, rates, decay=0.9, backend=backend)
        options = {"ahead": ahead, "delta": delta, "backend": backend}
        apply(plan, parameters, entries, rates, **options)

    run()
    ready = planned(plan)
    kept = {**ready._members}, {**ready._tables}, {**ready._scratch}

    def fail(*arguments, **options):
        raise AssertionError("planned again")

    for function in ("_upload", "_shape"):
        monkeypatch.setattr(launch, function, fail)
    run()
    assert planned(plan) is ready
    assert kept == (ready._members, ready._tables, ready._scratch)


def test_tensors_at_other_places_share_a_table(device):
    shapes = [(128, 64), (64, 64)]
    plan = one_class(shapes, k=4, device=device)
    ready = planned(plan)
    one, other = (random(shapes, device, seed) for seed in range(2))
    first, second = ready.members(one, "gradient"), ready.members(other, "gradient")
    assert first is ready.members(one, "parameter")
    assert first.table is second.table
    assert first.addresses[:, 0].tolist() == [t.data_ptr() for t in one]
    assert second.addresses[:, 0].tolist() == [t.data_ptr() for t in other]
    assert first.addresses[:, 1].tolist() == [64, 64]


def test_a_gradient_that_comes_and_goes(device):
    plan = one_class([(64, 64), (64, 64)], k=4, device=device)
    ready = planned(plan)
    one, other = random([(64, 64)] * 2, device)
    assert ready.members([one, None], "gradient").addresses.tolist() == [
        [one.data_ptr(), 64],
        [0, 0],
    ]
    assert ready.members([None, other], "gradient").addresses.tolist() == [
        [0, 0],
        [other.data_ptr(), 64],
    ]
    assert ready.members([None, None], "gradient").addresses.tolist() == [[0, 0], [0, 0]]


def test_tables_are_kept_in_bounds(device):
    """The ones used last; results stay right when they are made again."""
    plan = one_class([(64, 64)], k=4, device=device)
    ready = planned(plan)
    memory = torch.zeros(64 * 200, device=device)
    views = [memory.as_strided((64, 64), (64 + i, 1), i) for i in range(3 * launch._TABLES_KEPT)]
    first = ready.members(views[:1], "gradient")
    for view in views:
        assert ready.members(views[:1], "gradient") is first
        assert ready.members([view], "gradient").addresses.tolist() == [
            [view.data_ptr(), view.stride(0)]
        ]
    assert len(ready._members) == launch._TABLES_KEPT
    assert len(ready._tables) == launch._TABLES_KEPT
    again = ready.members(views[1:2], "gradient")
    assert again.addresses.tolist() == [[views[1].data_ptr(), 65]]


def test_what_is_planned_goes_with_the_plan(device):
    plan = one_class([(64, 64)], k=4, device=device)
    planned(plan)
    before = len(launch._planned)
    del plan
    gc.collect()
    assert len(launch._planned) < before


class Stream:
    """A CUDA stream as launches see it."""

    def __init__(self):
        self.done = False

    def query(self):
        return self.done


@pytest.fixture
def streams(monkeypatch):
    """Two streams at work, of which the current one can be set."""
    state = SimpleNamespace(one=Stream(), other=Stream())
    state.current = state.one
    for module in (launch, accumulate):
        monkeypatch.setattr(module, "current_stream", lambda device: state.current)
    return state


@pytest.mark.parametrize("operation", ["encode", "apply", "subtract", "lookahead"])
def test_two_streams_at_once_are_refused(operation, device, backend, streams):
    plan = one_class([(64, 64)], k=4, device=device)
    delta = torch.zeros(1, 64, 64, device=device)
    gradient, parameter, ahead = random([(64, 64)] * 3, device)
    own = encode(plan, delta, [gradient], [0.1], decay=0.9, backend=backend)
    changing = delta, parameter, ahead
    before = [t.clone() for t in changing]
    call = {
        "encode": lambda: encode(plan, delta, [gradient], [0.1], decay=0.9, backend=backend),
        "apply": lambda: apply(plan, [parameter], own, [0.1], backend=backend),
        "subtract": lambda: subtract(plan, delta, own, backend=backend),
        "lookahead": lambda: lookahead(plan, [parameter], delta, [0.1], [ahead], backend=backend),
    }[operation]
    streams.current = streams.other
    with pytest.raises(RuntimeError, match=r"two CUDA streams at once: call torch\.cuda\.synch"):
        call()
    assert all(torch.equal(t, b) for t, b in zip(changing, before, strict=True))
    streams.one.done = True
    call()
    assert not all(torch.equal(t, b) for t, b in zip(changing, before, strict=True))
    streams.current = streams.one  # and back, which is a move like any other
    with pytest.raises(RuntimeError, match="two CUDA streams at once"):
        call()


def test_optimisers_on_streams_of_their_own_do_not_read_each_others_uploads(device, streams):
    one = launch.rates([0.3, 0.4], device)[0]
    streams.current = streams.other
    other = launch.rates([0.3, 0.4], device)[0]
    assert one.data_ptr() != other.data_ptr()
    assert launch.rates([0.3, 0.4], device)[0] is other
    streams.current = streams.one
    assert launch.rates([0.3, 0.4], device)[0] is one


def test_sums_on_two_streams_do_not_read_each_others_tables(device, backend, streams, monkeypatch):
    """One plan serves whoever has tensors of these sizes."""
    plan = accumulation.plan_accumulation((5, 7), (0, 0), device)
    read = []
    tensors = accumulate._Tables.tensors
    monkeypatch.setattr(
        accumulate._Tables, "tensors", lambda self, rows: read.append(self) or tensors(self, rows)
    )
    gradients = random([(5,), (7,)], device)
    for stream in (streams.one, streams.other, streams.one):
        streams.current = stream
        accumulation.squared_norms(plan, gradients, backend=backend)
    assert read[0] is read[2]
    assert read[0].block_tensor.data_ptr() != read[1].block_tensor.data_ptr()


def test_rates(device):
    equal, several = [0.25, 0.25, 0.25], [0.25, 0.5, 0.75]
    one, one_step = launch.rates(equal, device)
    assert (one.tolist(), one_step) == ([0.25], 0)
    assert launch.rates(equal[:2], device)[0] is one
    many, many_step = launch.rates(several, device)
    assert (many.tolist(), many_step) == (several, 1)
    assert launch.rates(tuple(several), device)[0] is many
    assert one.dtype == many.dtype == torch.float32
    assert (one.device.type, many.device.type) == (device.type, device.type)
    assert launch.rates(None, device)[0].tolist() == [1.0]
    given = torch.tensor(several, device=device)
    assert launch.rates(given, device) == (given, 1)
    assert launch.rates(given[0], device)[1] == 0
    assert launch.rates(given[:1].expand(3), device)[1] == 0


def test_rates_are_kept_in_bounds(device):
    """A schedule gives another one every step."""
    for number in range(3 * launch._RATES_KEPT):
        assert launch.rates([float(number)], device)[0].item() == number
    assert len(launch._rates) == launch._RATES_KEPT
    assert launch.rates([0.0], device)[0].item() == 0


@pytest.mark.parametrize(
    ("shape", "aligned_as", "misaligned_as"),
    [
        ((64, 64), ["whole", "rows", "columns"], ["odd"]),
        ((2, 64, 64), ["whole", "rows", "columns"], ["odd"]),
        ((128,), ["whole"], ["odd"]),
        ((67, 64), ["whole", "columns"], ["odd"]),
        ((50, 50), [], ["whole"]),
        ((64, 67), [], ["whole"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment(shape, aligned_as, misaligned_as, dtype, device):
    plan = one_class([shape], k=1, device=device, dtype=dtype)
    ready = planned(plan)
    for places, expected in ((aligned_as, True), (misaligned_as, False)):
        for place in places:
            view = Guarded(torch.zeros(shape), place, device=device, dtype=dtype).tensor
            assert ready.members([view], "parameter").aligned == expected


def test_one_misaligned_tensor_misaligns_its_class(device):
    plan = one_class([(64, 64)] * 2, k=1, device=device)
    ready = planned(plan)
    views = [Guarded(torch.zeros(64, 64), p, device=device).tensor for p in ("whole", "odd")]
    assert not ready.members(views, "parameter").aligned
    assert ready.members([views[0], None], "gradient").aligned


WRONG = [
    (lambda t: t.to("meta"), "is on meta, its parameter on"),
    (lambda t: t.t().contiguous().t(), "must lie side by side"),
    (lambda t: t[:64], "has shape"),
    (lambda t: t.view(-1), "has shape"),
    (lambda t: t.unsqueeze(0), "has shape"),
]


@pytest.mark.parametrize("what", ["parameter", "look-ahead"])
@pytest.mark.parametrize(("spoil", "message"), [*WRONG, (torch.Tensor.bfloat16, "is torch.bfloa")])
def test_wrong_parameters_are_refused(what, spoil, message, device, backend):
    shapes = [(64, 64), (128, 64)]
    plan = one_class(shapes, k=4, device=device)
    delta = torch.ones(plan.chunks, plan.h, plan.w, device=device)
    right = random(shapes, device)
    wrong = [right[0], spoil(right[1])]
    before = [t.clone() for t in right]
    parameters, ahead = (wrong, right) if what == "parameter" else (right, wrong)
    with pytest.raises(ValueError, match=f"{what} number 1.*{message}"):
        lookahead(plan, parameters, delta, [0.1, 0.1], ahead, backend=backend)
    assert all(torch.equal(t, b) for t, b in zip(right, before, strict=True))


@pytest.mark.parametrize(("spoil", "message"), [WRONG[0], *WRONG[2:]])
def test_wrong_gradients_are_refused(spoil, message, device, backend):
    shapes = [(64, 64), (128, 64)]
    plan = one_class(shapes, k=4, device=device)
    delta = torch.ones(plan.chunks, plan.h, plan.w, device=device)
    gradients = random(shapes, device)
    options = {"decay": 0.9, "backend": backend}
    encode(plan, delta.clone(), gradients, [0.1, 0.1], **options)
    # The same memory in another shape is not taken for what is known already.
    gradients[1] = spoil(gradients[1])
    with pytest.raises(ValueError, match=f"gradient number 1.*{message}"):
        encode(plan, delta, gradients, [0.1, 0.1], **options)
    assert (delta == 1).all()


def test_rows_too_far_apart_are_refused(device, backend):
    plan = one_class([(2, 64)], k=1, device=device)
    memory = torch.empty((1 << 25) + 64, device=device)
    with pytest.raises(ValueError, match="parameter number 0: rows are 33554432 elements apart"):
        planned(plan).members([memory.as_strided((2, 64), (1 << 25, 1))], "parameter")


def offsets_by_indexing(shape, strides, chunk=64):
    """First element of every chunk, in Python's integers, through the oracle's windows."""
    starts = []
    for window in oracles.chunk_windows(shape, chunk):
        first = [w.start if isinstance(w, slice) else w for w in window]
        starts.append(sum(f * s for f, s in zip(first, strides, strict=True)))
    return starts


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 16), min_size=0, max_size=4).map(tuple), min_size=1, max_size=3
    ),
    chunk=st.sampled_from([4, 8]),
    gaps=st.lists(st.integers(0, 1 << 33), min_size=4, max_size=4),
)
def test_table(shapes, chunk, gaps, device):
    """Any shapes and strides, of more than 2^31 elements too, against indexing."""
    layouts = [
        ParameterLayout.of(
            str(i), s, torch.float32, device, compression_chunk=chunk, compression_topk=1
        )
        for i, s in enumerate(shapes)
    ]
    for plan in Layout(layouts).plans:
        strides, expected = [], []
        for number, member in enumerate(plan.members):
            shape = shapes[member.position] or (1,)
            steps = [*gaps[: len(shape) - 1], 1]
            strides.append(tuple(steps))
            expected += [[number, at] for at in offsets_by_indexing(shape, steps, chunk)]
        table = planned(plan)._table(plan, tuple(strides))
        assert table.dtype == torch.int64
        assert table.device.type == device.type
        assert table.tolist() == expected


def test_table_of_a_large_parameter(device):
    """40 000 x 64 rows of 64 with room for 2^24 between them: offsets of up to 2^46."""
    plan = one_class([(40_000 * 64, 64)], k=1, device=device)
    table = planned(plan)._table(plan, ((1 << 24, 1),)).cpu()
    assert torch.equal(table[:, 1], torch.arange(40_000) << 30)
    assert not table[:, 0].any()


@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 50, 50), (2, 1, 64), (2, 64, 1)])
def test_elements_beyond_32_bits(shape, device, backend):
    """Two experts that lie more than 2^31 elements apart. Only what is touched costs memory."""
    plan = one_class([shape], k=4, device=device, dtype=torch.bfloat16)
    memory = torch.empty(HUGE + (1 << 20), dtype=torch.bfloat16, device=device)
    strides = (HUGE + 8192, shape[2], 1)
    parameter, gradient, ahead = (memory.as_strided(shape, strides, 100_000 * i) for i in range(3))
    weights, slopes = random([shape] * 2, device)
    parameter.copy_(weights)
    gradient.copy_(slopes)
    near = [t.contiguous() for t in (parameter, gradient, ahead)]
    outcomes = []
    for p, g, a in (near, (parameter, gradient, ahead)):
        delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
        entries = encode(plan, delta, [g], [0.1], decay=0.9, backend=backend)
        apply(plan, [p], entries, [0.1], ahead=[a], delta=delta, backend=backend)
        outcomes.append([delta, entries.indices.int(), entries.values, p.clone(), a.clone()])
        lookahead(plan, [p], delta, [0.2], [a], backend=backend)
        outcomes[-1].append(a.clone())
    assert all(torch.equal(n, f) for n, f in zip(*outcomes, strict=True))
    assert not torch.equal(outcomes[0][3], weights.bfloat16())


class NothingIsWaitedFor(TorchDispatchMode):
    """Fails at operations that bring a tensor's content to the host."""

    READS = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
        torch.ops.aten.masked_select,
    )

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function.overloadpacket not in self.READS, f"{function} waits for the device"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["64x64", "1x64"])
def test_nothing_is_waited_for(name, device, backend):
    shapes = CLASSES[name]
    plan = one_class(shapes, k=4, device=device)
    delta = torch.zeros(plan.chunks, plan.h, plan.w, device=device)
    gradients, parameters = random(shapes, device), random(shapes, device, 1)
    rates = torch.full((len(shapes),), 0.1, device=device)
    scale = torch.tensor(0.5, device=device)
    with NothingIsWaitedFor():
        previous = step(plan, delta, gradients, parameters, backend)
        options = {"rates": rates, "gradient_scale": scale, "previous": previous}
        several = Entries(previous.indices, previous.values)
        step(plan, delta, gradients, parameters, backend, **options)
        step(plan, delta, gradients, parameters, backend, **(options | {"previous": several}))
    with pytest.raises(AssertionError, match="waits for the device"), NothingIsWaitedFor():
        scale.item()
