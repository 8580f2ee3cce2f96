"""DisTrO results in Psyche's bytes: the forms themselves, what is refused, the command."""

from __future__ import annotations

import math
import os
import re
import time
import tracemalloc
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from psyche_fast import cli
from psyche_fast.distro import Distro, DistroResult
from psyche_fast.distro.results import quantize_1bit
from psyche_fast.psyche.dump import read_file
from psyche_fast.psyche.postcard import KINDS, Reader, SerializableTensor
from psyche_fast.psyche.results import (
    SerializedDistroResult,
    TransmittableDistroResult,
    gradient,
    read_dump,
    read_list,
    write_dump,
)
from tests.tiny import save_llama

# Figures of Psyche's own structs and postcard's rules.
RESULT = "02040400000004000201 03 020404 0b 00 01 01 09 020404 04"
TRANSMITTED = "03 07 10 1f 01" + RESULT
HASH = "95d341cb19dec4d3f5451d4d19d219fa2e473e8d170a76815845c566008a4a28"
TENSORS = [
    (torch.tensor([1, 0, 0, 1, 0, 1, 1, 1]).bool(), "01 10 0b 00 01 01 e9"),
    (
        torch.tensor([1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0]).bool().view(1, 3, 5),
        "03 02 06 0a 0b 00 01 02 e9 2c",
    ),
    (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "02 04 04 06 00 00 10 0000803f 00000040 00004040 00008040",
    ),
    (torch.tensor([1, 0x203, 65535], dtype=torch.uint16), "01 06 1b 00 00 06 0100 0302 ffff"),
    (torch.tensor([1 << 31], dtype=torch.uint32), "01 02 1c 00 00 04 00000080"),
    (torch.tensor(1.0, dtype=torch.bfloat16), "00 0f 00 00 02 803f"),
    (torch.zeros(3, 0, dtype=torch.bool), "02 06 00 0b 00 01 00"),
    (torch.zeros(130, dtype=torch.uint8), "01 8402 00 00 00 8201" + "00" * 130),
]


def result() -> SerializedDistroResult:
    return SerializedDistroResult.from_bytes(bytes.fromhex(RESULT))


@pytest.mark.parametrize(("tensor", "form"), TENSORS)
def test_tensors_byte_for_byte(tensor: torch.Tensor, form: str) -> None:
    sent = SerializableTensor.of(tensor)
    assert sent.to_bytes() == bytes.fromhex(form)
    read = SerializableTensor.from_bytes(bytes.fromhex(form))
    assert read == sent
    assert read.tensor().dtype == tensor.dtype
    assert torch.equal(read.tensor(), tensor)


def test_the_round_trips_of_psyches_own_tests() -> None:
    waves = [0.6533, 0.2706, -0.2706, -0.6533]
    numbers = torch.rand(2, 16, 2, 25, 2, 215, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    bits = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1]).bool()
    tensors = [torch.tensor(waves), torch.tensor([waves, [230.4230, -25774.5, 0.0, 25.0]])]
    tensors += [numbers * 1000, numbers.signbit(), bits.view(4, 4), bits[:5], bits[:1]]
    tensors.append(bits[:15].view(1, 3, 5))
    for tensor in tensors:
        read = SerializableTensor.from_bytes(SerializableTensor.of(tensor).to_bytes()).tensor()
        assert torch.equal(read, tensor)
    # One bit of all coefficients, True where positive in that test, brings back their signs.
    matrix = torch.tensor(
        [[0.5] * 4, waves, [0.5, -0.5, -0.5, 0.5], [0.2706, -0.6533, 0.6533, -0.2706]]
    )
    order = matrix.abs().sort(-1, descending=True).indices
    form = made(order.byte(), matrix.gather(-1, order) > 0, (4, 4), 4)
    back = SerializedDistroResult.from_bytes(form.to_bytes()).result()
    signs = back.sparse_val.float() * 2 - 1
    assert torch.equal(torch.zeros(4, 4).scatter(-1, back.sparse_idx.long(), signs), matrix.sign())


def test_every_kind_comes_back_with_its_bits_and_requires_grad() -> None:
    rng = np.random.default_rng(0)
    for dtype in KINDS.values():
        raw = torch.from_numpy(rng.integers(0, 256, 24 * 8, dtype=np.uint8))  # NaNs too
        tensor = (raw > 127) if dtype == torch.bool else raw.view(dtype)
        tensor = tensor[: tensor.numel() // 2 * 2].view(2, -1).t()  # not contiguous
        read = SerializableTensor.from_bytes(SerializableTensor.of(tensor).to_bytes()).tensor()
        assert read.dtype == dtype
        wanted = tensor.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(read.contiguous().view(-1).view(torch.uint8), wanted), dtype
    with_gradient = SerializableTensor.of(torch.ones(2, requires_grad=True))
    assert with_gradient.to_bytes() == bytes.fromhex("01 04 06 01 00 08 0000803f 0000803f")
    assert SerializableTensor.from_bytes(with_gradient.to_bytes()).tensor().requires_grad


def test_a_whole_result_and_what_is_committed_to() -> None:
    idx, val = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1, 0], [0, 1]]).bool()
    own = DistroResult(idx.to(torch.uint8), val, (4, 4), 4)
    sent = TransmittableDistroResult(3, 7, (16, 31), (SerializedDistroResult.of(own),))
    assert sent.to_bytes() == bytes.fromhex(TRANSMITTED)
    assert sent.commitment().hex() == HASH
    assert TransmittableDistroResult.from_bytes(bytes.fromhex(TRANSMITTED)) == sent
    back = result().result()
    assert torch.equal(back.sparse_idx, own.sparse_idx)
    assert torch.equal(back.sparse_val, own.sparse_val)
    assert (back.xshape, back.totalk) == ((4, 4), 4)


@pytest.mark.parametrize(
    ("chunk", "topk", "size"),
    [(4, 3, 1), (16, 5, 1), (32, 5, 2), (300, 2, 4)],  # indices of one, one, two and four bytes
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signs", [False, True])
def test_our_results_go_and_come_and_stand_for_what_we_apply(
    chunk: int, topk: int, size: int, dtype: torch.dtype, signs: bool
) -> None:
    """Whole: written, read, decoded here and applied by a peer; a cube, a matrix and a vector."""
    torch.manual_seed(chunk)
    shapes = {"a": (2, 2 * chunk, chunk), "b": (3 * chunk,), "c": (chunk, 2 * chunk)}
    shapes |= {"d": (7,), "e": ()}
    start = {n: (torch.randn(s) * 3).to(dtype) for n, s in shapes.items()}

    def peer() -> tuple[dict[str, torch.Tensor], Distro]:
        named = {n: p.clone().requires_grad_() for n, p in start.items()}
        return named, Distro(
            named, compression_decay=0.9, compression_topk=topk, compression_chunk=chunk,
            weight_decay=0.0,
        )  # fmt: skip

    sender, distro = peer()
    for p in sender.values():
        p.grad = torch.randn_like(p)
    own = distro.generate(None, 0.5, 0.5)
    sent = quantize_1bit(own) if signs else own
    forms = [SerializedDistroResult.of(r) for r in sent]
    assert forms[0].index_bytes == size
    data = write_dump(forms)
    read = read_dump(Reader(data))
    assert read == forms
    received = [form.result() for form in read]
    for one, other in zip(sent, received, strict=True):
        assert one.sparse_val.dtype == other.sparse_val.dtype
        assert torch.equal(one.sparse_idx, other.sparse_idx)
        assert torch.equal(one.sparse_val, other.sparse_val)
    (ours, one), (theirs, other) = peer(), peer()
    one.apply([sent], 0.5)
    other.apply([received], 0.5)
    for name, form in zip(shapes, read, strict=True):
        assert torch.equal(ours[name], theirs[name])
        decoded = gradient(form)
        assert decoded.shape == (shapes[name] or (1,))
        torch.testing.assert_close(decoded, dense(form).float(), rtol=1e-4, atol=1e-4)
        moved = (start[name].float() - ours[name].detach().float()).view(decoded.shape)
        clear = decoded.abs() > 1e-3 * decoded.abs().max()
        assert torch.equal(moved.sign()[clear], decoded.sign()[clear]), name


def dense(form: SerializedDistroResult) -> torch.Tensor:
    """The definition in float64: each coefficient times its cosines, added up."""
    *lead, h, w = form.xshape if len(form.xshape) > 2 else (form.xshape[0], 1, form.totalk)
    val = form.sparse_val.tensor().detach()
    val = (1.0 - 2.0 * val.double()) if val.dtype == torch.bool else val.double()

    def waves(n: int) -> torch.Tensor:
        at, f = torch.arange(n).double(), torch.arange(n).double().unsqueeze(1)
        waves = torch.cos(torch.pi * (2 * at + 1) * f / (2 * n)) * (2 / n) ** 0.5
        waves[0] *= 0.5**0.5
        return waves

    idx = torch.from_numpy(form.indices().astype(np.int64))
    out = torch.zeros(*lead, h, w, dtype=torch.float64)
    for slot in range(form.k):
        one = val[..., slot, None, None] * waves(h)[idx[..., slot] // w].unsqueeze(-1)
        out += one * waves(w)[idx[..., slot] % w].unsqueeze(-2)
    return out.transpose(-3, -2).reshape(form.shape) if len(form.xshape) > 2 else out.view(-1)


def made(
    idx: torch.Tensor, val: torch.Tensor, xshape: tuple[int, ...], totalk: int
) -> SerializedDistroResult:
    of = SerializableTensor.of
    return SerializedDistroResult(of(idx), of(val), xshape, totalk)


def test_indices_by_value_repeated_ones_and_missing_chunks() -> None:
    """What a reader of Psyche's takes besides what its sender writes."""
    values = torch.tensor([[1.0, 3.0]])
    for dtype in (torch.uint16, torch.uint32, torch.int64):
        form = made(torch.tensor([[5, 299]]).to(dtype), values, (1, 300), 300)
        wide = form.result().sparse_idx
        assert (wide.dtype, wide.tolist()) == (torch.uint8, [[5, 0, 43, 1]])
    twice = made(torch.tensor([[0, 0]], dtype=torch.uint8), values, (2, 4), 4)
    # The first frequency of four is a half everywhere; the mean of 1 and 3; one chunk of two.
    assert gradient(twice).tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("01 ffffffffffffffffff01 00 00 00 00", "a dimension is negative"),
        ("01 03 00 00 00 00", "a dimension is negative"),
        ("01 808080808080808080 02 00 00 00 00", "more than 64 bits"),
        ("01 8080808080808080808001 00 00 00 00", "more than 64 bits"),
        ("01 8400 00 00 00 00", "more bytes than it takes"),
        ("01 04 08 00 00 10" + "00" * 16, "kind 8 is none of"),
        ("01 04 ff 00 00 02 0000", "kind 255 is none of"),
        ("01 04 00 02 00 02 0000", "wanted 0 or 1, got 2"),
        ("01 04 00 01 00 02 0000", "requires_grad"),
        ("01 04 00 00 01 02 0000", "in the form 1"),
        ("01 04 0b 00 00 02 0000", "in the form 0"),
        ("01 04 00 00 02 02 0000", "in the form 2"),
        ("01 04 06 00 00 04 00000000", "is 8 bytes, there are 4"),
        ("01 06 0b 00 01 01 08", "bits after the last bool"),
        ("01 04 00 00 00 02 00", "items in the 1 bytes"),
        ("01 04 00 00 00 ffffffffffffffffff01", "items in the 0 bytes"),
        ("ffffffffffffffffff01", "items in the 0 bytes"),
        ("41" + "02" * 65 + "00 00 00 01 00", "65 dimensions"),
        ("03 00 feffffffffffffffff01 feffffffffffffffff01 00 00 00 00", "more elements"),
        ("02 8080808040 8080808040 00 00 00 00", "more elements"),
        ("01 04 00 00 00 02 0000 00", "1 bytes too many"),
    ],
)
def test_tensors_that_are_refused(form: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SerializableTensor.from_bytes(bytes.fromhex(form))


BYTES = torch.tensor([[0, 2], [1, 3]], dtype=torch.uint8)
HALVES = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()


@pytest.mark.parametrize(
    ("idx", "val", "xshape", "totalk", "said"),
    [
        (BYTES, HALVES, (2, 3), 3, "an index is not below totalk 3"),
        (BYTES.long() - 1, HALVES, (2, 4), 4, "an index is not below"),
        (torch.tensor([[44, 1, 43, 1]] * 2).byte(), HALVES, (2, 300), 300, "an index is not below"),
        (BYTES, HALVES, (2, 4), 5, "totalk is 5"),
        (BYTES, HALVES, (2, 0), 0, "totalk is 0"),
        (BYTES, HALVES, (2, 2, 2, 2), 8, "totalk is 8"),
        (BYTES, HALVES, (1, 4), 4, "xshape is"),
        (BYTES, HALVES, (2, 1, 2, 2), 4, "xshape is"),
        (BYTES, HALVES, (), 4, "xshape has 0"),
        (BYTES, HALVES.view(4), (2, 4), 4, "sparse_val is"),
        (BYTES, HALVES[:, :1], (2, 4), 4, "sparse_idx is"),
        (BYTES[:1], HALVES, (2, 4), 4, "sparse_idx is"),
        (BYTES, HALVES, (2, 300), 300, "sparse_idx is"),
        (BYTES.repeat(1, 4), HALVES.repeat(1, 4), (2, 4), 4, "chunks have 4 coefficients"),
        (BYTES[:, :0], HALVES[:, :0], (2, 4), 4, "chunks have 4 coefficients"),
        (BYTES.char(), HALVES, (2, 4), 4, "sparse_idx is torch.int8"),
        (BYTES.bool(), HALVES, (2, 4), 4, "sparse_idx is torch.bool"),
        (BYTES.float(), HALVES, (2, 4), 4, "sparse_idx is torch.float32"),
        (BYTES, HALVES.char(), (2, 4), 4, "sparse_val is torch.int8"),
    ],
)
def test_results_that_are_refused(
    idx: torch.Tensor, val: torch.Tensor, xshape: tuple[int, ...], totalk: int, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        made(idx, val, xshape, totalk)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ValueError, match="below 65536"):
        SerializedDistroResult.of(
            DistroResult(torch.zeros(70_000, 1).byte(), torch.zeros(70_000, 1), (70_000, 4), 4)
        )
    with pytest.raises(ValueError, match=r"torch\.complex64 cannot be sent"):
        SerializableTensor.of(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"step: wanted a number in \[0, 2\^32\)"):
        TransmittableDistroResult(1 << 32, 0, (0, 1), ()).to_bytes()
    with pytest.raises(ValueError, match="goes backwards"):
        TransmittableDistroResult.from_bytes(bytes.fromhex("03 07 1f 10 00"))
    with pytest.raises(ValueError, match="more than 32 bits"):
        TransmittableDistroResult.from_bytes(bytes.fromhex("ffffffff1f 07 10 1f 00"))


def seeds() -> list[bytes]:
    """Transmitted results of each kind of index and value."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for xshape, totalk, idx in (
        ((2, 4), 4, torch.uint8), ((1, 2, 16, 16), 256, torch.uint8),
        ((2, 1, 20, 20), 400, torch.uint16), ((3, 300), 300, torch.int64),
    ):  # fmt: skip
        for val in (torch.bool, torch.bfloat16, torch.float32):
            lead = xshape[:-2] if len(xshape) > 2 else xshape[:-1]
            indices = torch.randint(0, totalk, (*lead, 3), generator=generator)
            values = torch.randn(*lead, 3, generator=generator)
            form = made(
                indices.to(idx), values < 0 if val == torch.bool else values.to(val), xshape, totalk
            )
            out.append(TransmittableDistroResult(9, 1 << 20, (5, 1 << 40), (form, form)).to_bytes())
    return out


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        at = int(rng.integers(len(out) + 1))
        match rng.integers(8):
            case 0:
                out = out[:at]
            case 1 | 6 | 7:
                out[at : at + 1] = bytes(rng.integers(0, 256, 1, dtype=np.uint8))
            case 2:
                del out[at : at + int(rng.integers(1, 9))]
            case 3:
                out[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
            case 4:  # a huge number
                out[at : at + 1] = b"\xff" * int(rng.integers(1, 11)) + b"\x01"
            case 5:
                out[at:at] = out[: int(rng.integers(len(out) + 1))]
    return bytes(out)


def hostile() -> Iterator[bytes]:
    rng, valid = np.random.default_rng(0), seeds()
    for data in valid:
        yield from (data[:size] for size in range(len(data)))
    until = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "0"))
    for _ in range(1000):
        yield mutated(valid[rng.integers(len(valid))], rng)
    while time.monotonic() < until:
        yield mutated(valid[rng.integers(len(valid))], rng)


def test_hostile_bytes_are_errors_in_bounded_time_and_memory() -> None:
    """Each is a ValueError, or has exactly one meaning: it is written as it was read.

    `FUZZ_SECONDS=600` in the environment goes on for ten minutes.
    """
    refused = read_whole = 0
    accepted: deque[tuple[SerializedDistroResult, DistroResult]] = deque(maxlen=200)
    tracemalloc.start()
    try:
        for data in hostile():
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                read = TransmittableDistroResult.from_bytes(data)
                assert read.to_bytes() == data
                results = [form.result() for form in read.distro_results]
            except ValueError:
                refused += 1
            else:
                read_whole += 1
                accepted.extend(zip(read.distro_results, results, strict=True))
            assert tracemalloc.get_traced_memory()[1] - before < 64 * len(data) + 200_000
            assert time.process_time() - began < 2.0
    finally:
        tracemalloc.stop()
    assert refused > 1000
    assert read_whole > 50
    for form, own in accepted:
        finite = own.sparse_val.dtype == torch.bool or own.sparse_val.isfinite().all()
        if finite and math.prod(form.xshape) <= 1 << 19 and len(form.xshape) != 3:
            assert gradient(form).shape == form.shape


def test_a_gradient_out_of_all_proportion_is_not_decoded() -> None:
    one = torch.zeros(1, 1, 1).byte(), torch.ones(1, 1, 1)
    many = made(*one, (65_535, 65_535, 2, 2), 4)
    with pytest.raises(ValueError, match="out of 5 bytes is not decoded"):
        gradient(many)
    wide = made(torch.zeros(1, 2).byte(), torch.ones(1, 1), (1, 60_000), 60_000)
    with pytest.raises(ValueError, match="up to 1024 a side"):
        gradient(wide)
    large = torch.full((2, 2), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        gradient(made(BYTES, large, (2, 4), 4))
    nothing = made(torch.zeros(0, 1).byte(), torch.zeros(0, 1), (0, 1), 1)
    assert gradient(nothing).shape == (0,)
    with pytest.raises(ValueError, match="not finite"):
        gradient(made(BYTES, HALVES / 0, (2, 4), 4))
    with pytest.raises(ValueError, match="it has 3 dimensions"):
        gradient(made(BYTES, HALVES, (2, 2, 2), 4))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["results", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_shows_and_decodes_all_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = bytes.fromhex(RESULT)
    (tmp_path / "sent.bin").write_bytes(bytes.fromhex(TRANSMITTED))
    (tmp_path / "list.bin").write_bytes(b"\x02" + one * 2)
    (tmp_path / "result-node-step3-batchB[16, 31].vec-postcard").write_bytes(one)
    (tmp_path / "result-node-step4-batchB7.vec-postcard").write_bytes(one * 11)
    forms = {file.name: read_file(file) for file in tmp_path.iterdir()}
    assert {name: (d.step, d.batch_id, len(d.results)) for name, d in forms.items()} == {
        "sent.bin": (3, (16, 31), 1),
        "list.bin": (None, None, 2),
        "result-node-step3-batchB[16, 31].vec-postcard": (3, (16, 31), 1),
        "result-node-step4-batchB7.vec-postcard": (4, (7, 7), 11),
    }
    for name in ("sent.bin", "result-node-step3-batchB[16, 31].vec-postcard"):
        status, out, err = run(capsys, str(tmp_path / name))
        assert (status, err) == (0, "")
        assert HASH in out
        row = next(line for line in out.splitlines() if line.startswith("0 "))
        assert row.split() == ["0", "16", "4", "2", "of", "4", "2", "of", "4", "bool", "5"]
    name = "result-node-step4-batchB7.vec-postcard"
    target = tmp_path / "new" / "out.safetensors"
    status, out, _ = run(capsys, str(tmp_path / name), "--decode", str(target))
    assert status == 0
    decoded = load_file(target)
    assert sorted(decoded) == [f"{n:02}" for n in range(11)]
    assert torch.equal(decoded["10"], gradient(result()))
    assert [file.name for file in target.parent.iterdir()] == ["out.safetensors"]


def test_the_command_names_a_models_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = save_llama(tmp_path / "model", tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    named = dict(sorted(model.named_parameters()))
    for p in named.values():
        p.grad = torch.randn_like(p)
    distro = Distro(
        named, compression_decay=0.9, compression_topk=1 << 20, compression_chunk=16,
        weight_decay=0.0,
    )  # fmt: skip
    forms = [SerializedDistroResult.of(r) for r in distro.generate(None, 1.0, 1.0)]
    file, target = tmp_path / "all.vec-postcard", tmp_path / "g.safetensors"
    file.write_bytes(write_dump(forms))
    status, out, _ = run(capsys, str(file), "--model", str(folder), "--decode", str(target))
    assert status == 0
    assert "model.layers.1.mlp.up_proj.weight" in out
    decoded = load_file(target)
    assert list(decoded) == list(named)
    # All coefficients are kept, momentum is the gradient times the rate: it comes back whole.
    for name, p in named.items():
        torch.testing.assert_close(decoded[name], p.grad, rtol=1e-4, atol=1e-4)
    target.unlink()
    file.write_bytes(write_dump(forms[1:]))
    status, out, err = run(capsys, str(file), "--model", str(folder), "--decode", str(target))
    assert (status, out, target.exists()) == (2, "", False)
    assert re.search(r"--model has 20 parameters, there are 19 results", err)
    file.write_bytes(write_dump(forms[::-1]))
    status, out, err = run(capsys, str(file), "--model", str(folder))
    assert "model.embed_tokens.weight has the shape [96, 32], its result [32]" in err


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, [], "No such file"),
        (b"", [], "it is empty"),
        (b"hello, world", [], "holds no results of Psyche's: as a"),
        (bytes.fromhex(TRANSMITTED)[:-3], [], "as a transmitted result, byte"),
        (bytes.fromhex(TRANSMITTED) + b"\0", [], "1 bytes too many"),
        (bytes.fromhex(RESULT), ["--decode", "out.bin"], "ends in .safetensors"),
        (bytes.fromhex(RESULT), ["--model", "./nowhere"], "--model"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    arguments: list[str],
    said: str,
) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    status, _, err = run(capsys, str(tmp_path / "file"), *arguments)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_list_may_be_of_none() -> None:
    assert read_list(Reader(b"\0")) == []
