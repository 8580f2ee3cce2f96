"""Every parser of bytes from outside, with valid ones to begin from: `PARSERS`."""

from __future__ import annotations

import hashlib
import json
import socket
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from psyche_fast import strict
from psyche_fast.batch import IGNORE, Batch
from psyche_fast.config import RunConfig, read_toml
from psyche_fast.core.resume import Start, check_start, identity, machine_of
from psyche_fast.data import BlockCache, http, open_dataset, remote
from psyche_fast.data.local import LocalDataset
from psyche_fast.data.parquet import ParquetDataset
from psyche_fast.data.samples import Sample
from psyche_fast.distro import DistroResult
from psyche_fast.kernels import tuning
from psyche_fast.metrics.writer import MetricsWriter, read_metrics
from psyche_fast.models.source import FilesSource, check_model
from psyche_fast.psyche import messages, results
from psyche_fast.rank import protocol, saving, state
from psyche_fast.rank.state import Manifest, Piece, StateFile
from psyche_fast.runfile import read_run_file
from psyche_fast.start import probe
from psyche_fast.start.devices import Processor
from tests.distro.test_message import form, layout, random_entries, resealed
from tests.test_runfile import LARGE, SMALL
from tests.tiny import save_llama

Parser = tuple[list[bytes], Callable[[bytes], Any]]


def _operations() -> Parser:
    ids = torch.arange(12).view(2, 6)
    labels = ids.clone()
    labels[0, :3] = IGNORE
    operations = [
        protocol.Train.of(3, Batch(ids)),
        protocol.Train.of(4, Batch(ids + 70_000, labels, ids, [[2, 4], [6]])),
        protocol.Save(7),
        protocol.Exit(),
    ]
    packed = [b"1\n" + msgspec.msgpack.encode(operation) for operation in operations]

    def parse(data: bytes) -> None:
        operation = protocol.read_operation(data, lambda piece: b"")
        if isinstance(operation, protocol.Train):
            batch = operation.batch()
            assert batch.input_ids.shape == operation.shape
            assert int(batch.input_ids.min()) >= 0

    return packed, parse


def _handshake() -> Parser:
    config = RunConfig.of(output="run", total_batch=4)
    valid = protocol.Handshake(config=config, files=["~/config.json", "/m/model.safetensors"])
    return [msgspec.json.encode(valid)], lambda data: protocol.read_run(data.decode())


def _processors() -> Parser:
    valid = msgspec.json.encode(Processor("cuda", "NVIDIA H200", "sm_90"))
    return [valid], lambda data: strict.read(data, Processor, "store key")


def _saved() -> Parser:
    file = StateFile(name="rank-00000.safetensors", size=3, sha256="0" * 64)
    valid = [protocol.Saved(files=[file]), protocol.Saved(error="no space left")]
    encoded = [msgspec.json.encode(saved) for saved in valid]
    return encoded, lambda data: strict.read(data, protocol.Saved, "store key")


def _psyches_operations() -> Parser:
    valid: list[dict[str, Any]] = [
        {"operation": "train", "step": 3, "zero_optim": False, "batch_id": [3, 4],
         "batch_shape": [2, 8], "batch_has_labels": True, "batch_sequence_lengths": [[8], [4, 4]],
         "warmup_lr_between": [1, 2], "results_len": 1, "results_metadata":
         {"sparse_idx_size": [[1, 2]], "sparse_idx_dtype": 0, "sparse_val_size": [[1, 2]],
          "sparse_val_dtype": 6, "xshape": [[1, 4]], "totalk": [4]}},
        {"operation": "hyperparameters", "micro_batch_size": 2, "grad_accum_in_fp32": True,
         "lr_scheduler": {"Cosine": {"base_lr": 4e-4, "warmup_steps": 5, "warmup_init_lr": 0.0,
         "total_steps": 100, "final_lr": 4e-5}},
         "optimizer": {"AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1e-8}}},
        {"operation": "forward", "batch_shape": [1, 4], "num_logits_to_keep": 2},
        {"operation": "exit"},
    ]  # fmt: skip
    encoded = [json.dumps(one).encode() for one in valid]
    for data in encoded:
        messages.decode(data, 0)
    return encoded, lambda data: messages.decode(data, 5)


def _messages(*, signs: bool) -> Parser:
    of = layout({"a": (32, 24), "b": (40,)})
    shape = form(of, signs=signs)
    valid = [shape.pack(random_entries(of, seed), 3, 1).numpy().tobytes() for seed in range(3)]

    def parse(data: bytes) -> None:
        row = torch.frombuffer(bytearray(data[: shape.size].ljust(shape.size)), dtype=torch.uint8)
        refused = {}
        for sealed in (row, resealed(row.clone())):
            rows = sealed[None]
            found = shape.faults(rows, 3, [1])
            unpacking, further = shape.decode(rows, found)
            assert unpacking is not None
            entries, faults = unpacking.result()
            assert faults == further
            refused = found | faults
            assert shape._well_formed(rows).tolist() == [not further] or found
            if entries is not None:
                for plan, e in zip(of.plans, entries, strict=True):
                    indices = e.indices.long()
                    assert int(indices.max()) < plan.totalk
                    assert (indices[:, 1:] > indices[:, :-1]).all()
                    assert e.values.dtype == torch.bool or e.values.isfinite().all()
        if data not in valid and len(data) == shape.size and not shape.faults(row[None], 3, [1]):
            raise AssertionError("damage that the checksum does not see")
        if refused:
            raise ValueError(refused[0])

    return valid, parse


def _psyches_results() -> Parser:
    indices, values = torch.tensor([[[[1, 5]]]]).byte(), torch.randn(1, 1, 1, 2)
    made = DistroResult(indices.view(1, 1, 2), values.view(1, 1, 2), (1, 1, 4, 4), 16)
    one = results.SerializedDistroResult.of(made)
    valid = results.TransmittableDistroResult(9, 1 << 20, (5, 1 << 40), (one, one)).to_bytes()

    def parse(data: bytes) -> None:
        for one in results.TransmittableDistroResult.from_bytes(data).distro_results:
            one.result()

    return [valid], parse


def _folder() -> Path:
    """For this process, which is ended without clean-up: below pytest's own temporary folder."""
    return Path(tempfile.mkdtemp())


def _with_state(folder: Path) -> tuple[dict[str, Piece], bytes, bytes]:
    pieces = {
        "optimizer/delta/a": Piece(torch.randn(3, 4), whole=(7,), rows=torch.tensor([0, 3, 5])),
        "parameter/w": Piece(torch.randn(2, 3), (slice(0, 2), slice(0, 3)), (4, 3)),
        "random/cpu": Piece(torch.arange(8, dtype=torch.uint8)),
    }
    file = state.write_part(folder / state.FOLDER, state.rank_file(0), pieces)
    manifest = Manifest(
        version=state.VERSION, step=4, config=RunConfig().to_dict(), data=identity(_Data()),
        machine=machine_of(RunConfig(), torch.device("cpu")), files=[file],
    )  # fmt: skip
    state.write_manifest(folder / state.FOLDER, manifest)
    path = folder / state.FOLDER / state.MANIFEST
    return pieces, path.read_bytes(), path.with_name(file.name).read_bytes()


def _manifest() -> Parser:
    folder = _folder()
    _, valid, _ = _with_state(folder)

    def parse(data: bytes) -> None:
        (folder / state.FOLDER / state.MANIFEST).write_bytes(data)
        manifest = state.read_manifest(folder)
        state.check_sums(folder, manifest)
        check_start(Start(folder, manifest, ()), RunConfig(), _Data(), torch.device("cpu"))
        saving.fits(manifest, RunConfig())

    return [valid], parse


class _Data:
    """A data set, as far as its identity goes."""

    def __len__(self) -> int:
        return 3

    def get_samples(self, first: int, last: int) -> list[Sample]:
        ids = torch.arange(4)
        return [Sample(ids, ids)] * (last - first + 1)


def _state_file() -> Parser:
    """With a manifest that fits: a checkpoint from somebody else."""
    folder = _folder()
    pieces, _, valid = _with_state(folder)
    manifest = state.read_manifest(folder)
    name = manifest.files[0].name

    def parse(data: bytes) -> None:
        (folder / state.FOLDER / name).write_bytes(data)
        file = StateFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        reader = state.Reader(folder / state.FOLDER, [file], name, [])
        reader.names()
        for piece in pieces:
            reader.fill({piece: pieces[piece]})
        reader.tensor("random/cpu")

    return [valid], parse


def _model(part: str) -> Parser:
    folder = save_llama(_folder())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}})
    )
    if part == "model.safetensors":
        (folder / "model.safetensors.index.json").unlink()
    files = sorted(folder.iterdir())
    valid = (folder / part).read_bytes()

    def parse(data: bytes) -> None:
        (folder / part).write_bytes(data)
        check_model(FilesSource(tuple(files)))

    return [valid], parse


def _tokens(suffix: str) -> Parser:
    folder = _folder()
    path = folder / f"a{suffix}"
    array = np.arange(700, dtype=np.uint16)
    if suffix == ".npy":
        np.save(path, array)
    else:
        array.tofile(path)
    valid = path.read_bytes()

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read = LocalDataset(path, 2, 16)
        read.check_vocabulary(1 << 16)
        read.get_samples(0, len(read) - 1)

    return [valid], parse


def _parquet() -> Parser:
    path = _folder() / "train.parquet"
    valid = []
    for lengths in (False, True):
        columns: dict[str, Any] = {"inputs": [list(range(8))] * 5, "labels": [[1] * 8] * 5}
        if lengths:
            columns["sequence_lengths"] = [[8], [3, 5], [], [1], [8]]
        pq.write_table(pa.table(columns), path, row_group_size=3)
        valid.append(path.read_bytes())

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read = ParquetDataset(path, 8)
        read.get_samples(0, min(len(read), 10) - 1)

    return valid, parse


def _file(name: str, valid: list[str], read: Callable[[Path], Any]) -> Parser:
    path = _folder() / name

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    for text in valid:
        parse(text.encode())
    return [text.encode() for text in valid], parse


def _config() -> Parser:
    own = RunConfig.of(distro=True, replicas=2, total_batch=4, run_id="a").to_toml()
    return _file(
        "run.toml", [own, "total-batch = 6\nlearning_rate = 0.5\n"],
        lambda path: RunConfig.of(**read_toml(str(path))).to_toml(),
    )  # fmt: skip


def _mixture() -> Parser:
    folder = _folder()
    np.arange(700, dtype=np.uint16).tofile(folder / "a.bin")
    ours = f'[[data]]\npath = "{folder}/a.bin"\nweight = 0.5\n[[data]]\npath = "{folder}/a.bin"\n'
    ours = ours + "weight = 2\n"

    def read(path: Path) -> None:
        # Nothing is to be looked for on the network, whatever a mutation calls it.
        with mock.patch.object(remote, "find", side_effect=ValueError("no network here")):
            open_dataset(
                str(path), token_size=2, sequence_length=16, seed=None,
                cache=BlockCache(folder / "cache"),
            ).get_samples(0, 3)  # fmt: skip

    return _file("mix.toml", [ours], read)


def _run_file() -> Parser:
    return _file("state.toml", [SMALL, LARGE], lambda path: read_run_file(str(path)).under({}))


def _metrics() -> Parser:
    lines = '{"step":1,"loss":2.5,"seconds":{"train":0.1}}\n{"step":2,"loss":null}\n'

    def read(path: Path) -> None:
        read_metrics(path)
        MetricsWriter(path, drop_from_step=2)._file.close()

    return _file("metrics.jsonl", [lines], read)


def _tuning() -> Parser:
    shipped = Path(tuning.__file__).with_name("tuning.toml").read_text()
    return _file("tuning.toml", [shipped], tuning.read)


def _http() -> Parser:
    """A server's answers, whole: to the question for size and version, and to one for a range."""
    body = bytes(range(256)) * 4
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Type: application/octet-stream\r\n"
    first = head + b'Content-Range: bytes 0-0/1024\r\nETag: "v"\r\nContent-Length: 1\r\n\r\n\x00'
    whole = head + b'Content-Range: bytes 0-1023/1024\r\nETag: "v"\r\nContent-Length: 1024\r\n\r\n'
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 20\r\n\r\n"
    answers = [first, whole + body, page + b'<a href="a.bin">x</a>', first.replace(b"206", b"302")]
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/data/a.bin"
    said = [b""]

    def serve() -> None:
        while True:
            sock, _ = listening.accept()
            with sock:
                sock.settimeout(2)
                try:
                    while b"\r\n\r\n" not in sock.recv(1 << 16):
                        pass
                    sock.sendall(said[0])
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    http.SECONDS = 0.5

    def parse(data: bytes) -> None:
        said[0] = data
        files = http.HttpFiles()
        for ask in (
            lambda: files.info(url),
            lambda: files.find(url.removesuffix("a.bin")),
            lambda: files.cat_file(url, 0, 1024),
        ):
            try:
                ask()
            # What `remote.retried` makes of them, after another attempt or reading it whole.
            except (http.NoRangesError, HTTPException) as error:
                raise OSError(f"no answer: {error}") from error

    return answers, parse


def _probes() -> Parser:
    kinds = ((b"p", probe.PINGS), (b"u", 1 << 20), (b"d", probe.MOST_BYTES))
    size = probe.REQUEST.size
    asked = [probe.REQUEST.pack(probe.MAGIC, *kind) for kind in kinds]
    return asked, lambda data: probe.read_request(data[:size].ljust(size))


PARSERS: dict[str, Callable[[], Parser]] = {
    "requests of a link": _probes,
    "operations": _operations,
    "handshake": _handshake,
    "processors": _processors,
    "saved": _saved,
    "Psyche's operations": _psyches_operations,
    "messages of signs": partial(_messages, signs=True),
    "messages of values": partial(_messages, signs=False),
    "Psyche's results": _psyches_results,
    "manifest": _manifest,
    "state file": _state_file,
    "config.json": partial(_model, "config.json"),
    "index": partial(_model, "model.safetensors.index.json"),
    "safetensors": partial(_model, "model.safetensors"),
    "npy": partial(_tokens, ".npy"),
    "bin": partial(_tokens, ".bin"),
    "Parquet": _parquet,
    "config": _config,
    "mixture": _mixture,
    "run file": _run_file,
    "metrics": _metrics,
    "tuning": _tuning,
    "http": _http,
}
