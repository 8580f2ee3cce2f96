"""How our own core talks to its ranks: through the store to other replicas, and inside its own.

Store keys: `psyche_fast` holds the run; `psyche_fast/N/REPLICA` operation N for one replica, set
ahead of time: the number of pieces and the first of them, with further ones in
`psyche_fast/N/REPLICA/1` and so on. Only the first rank of a replica reads operations, so that a
batch crosses a slow link once, and hands them on to the other ranks of the replica, over gloo. They
are deleted once every rank has carried them out, so that their number does not grow with the run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast import strict
from psyche_fast.batch import IGNORE, Batch
from psyche_fast.config import RunConfig
from psyche_fast.models.source import FilesSource
from psyche_fast.rank.state import StateFile
from psyche_fast.rank.topology import Topology
from psyche_fast.start.store import StoreClient

FIRST_KEY = "psyche_fast"
"""The key by which a core is known to be ours."""

_SLICE = timedelta(seconds=0.5)
_PIECE = 4 << 20
"""The most bytes in one value: TCPStore refuses those of more than 8 MiB."""
_MOST_PIECES = 1 << 10


class Handshake(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every rank is told before anything else."""

    config: RunConfig
    """Resolved: what `auto` and 0 stand for is decided by rank 0."""
    files: list[str]
    """The model's; `~` is each machine's own home directory."""


class Train(msgspec.Struct, frozen=True, array_like=True, tag="train"):
    """A step: forward, backward, exchange and the optimiser's step."""

    step: int
    shape: tuple[int, int]
    """Rows and tokens of each."""
    input_ids: bytes
    labels: bytes | None
    position_ids: bytes | None
    sequence_lengths: list[list[int]] | None

    def __post_init__(self) -> None:
        rows, length = self.shape
        numbers = rows * length
        for name in ("input_ids", "labels", "position_ids"):
            packed = getattr(self, name)
            if packed is None and name != "input_ids":
                continue
            if min(rows, length) < 1 or len(packed) not in (2 * numbers, 4 * numbers):
                raise ValueError(f"{name}: {len(packed)} bytes for shape {list(self.shape)}")

    @staticmethod
    def of(step: int, batch: Batch) -> Train:
        """A step on a batch of the host's."""
        rows, length = batch.input_ids.shape
        labels = batch.labels
        return Train(
            step,
            (rows, length),
            _pack(batch.input_ids),
            # Moved by one, so that what no loss counts is 0.
            None if labels is None else _pack(labels.where(labels != IGNORE, -1) + 1),
            None if batch.position_ids is None else _pack(batch.position_ids),
            batch.sequence_lengths,
        )

    def batch(self) -> Batch:
        """The batch, on the host."""
        labels = None if self.labels is None else self._unpack(self.labels) - 1
        return Batch(
            self._unpack(self.input_ids),
            None if labels is None else labels.where(labels >= 0, IGNORE),
            None if self.position_ids is None else self._unpack(self.position_ids),
            self.sequence_lengths,
        )

    def _unpack(self, packed: bytes) -> Tensor:
        rows, length = self.shape
        width = len(packed) // (rows * length)
        return torch.from_numpy(np.frombuffer(packed, f"<u{width}").astype(np.int64)).view(
            rows, length
        )


class Save(msgspec.Struct, frozen=True, array_like=True, tag="save"):
    """Ranks compare their parameters and write their parts of a checkpoint."""

    step: int
    at_once: bool = False
    """Before anything else, rather than beside the next step."""


class Gather(msgspec.Struct, frozen=True, array_like=True, tag="gather"):
    """Ranks of rank 0's replica take part in gathering its plain parameters."""


class Join(msgspec.Struct, frozen=True, array_like=True, tag="join"):
    """After a step, a replica joins an elastic run."""

    step: int


class Evaluate(msgspec.Struct, frozen=True, array_like=True, tag="evaluate"):
    """Ranks of rank 0's replica take part in the loss of held-out rows."""

    rows: Train
    """What would be a step; nothing is trained."""


class Continue(msgspec.Struct, frozen=True, array_like=True, tag="continue"):
    """Ranks of rank 0's replica take part in continuing prompts."""

    step: int
    prompts: list[list[int]]
    """Token ids, one or more each."""
    tokens: int
    """To be added to each."""


class Exit(msgspec.Struct, frozen=True, array_like=True, tag="exit"):
    """The end of the run."""


Operation = Train | Save | Gather | Join | Evaluate | Continue | Exit


def _pack(tensor: Tensor) -> bytes:
    """Numbers from 0 in as many bytes as the largest needs: 2 or 4."""
    kind = "<u2" if int(tensor.max()) < 1 << 16 else "<u4"
    return tensor.numpy().astype(kind).tobytes()


class Sender:
    """Rank 0's side.

    Args:
        store: the store that rank 0 hosts.
        replicas: of the run.

    Attributes:
        others: the replicas that are told.
    """

    def __init__(self, store: dist.Store, replicas: int) -> None:
        self._store = store
        self.others: Collection[int] = range(1, replicas)
        self._keys: deque[tuple[int, list[str]]] = deque()
        self._number = 0

    def publish_run(self, config: RunConfig, source: FilesSource, home: Path) -> None:
        """Leaves the run for all ranks.

        Args:
            config: resolved.
            source: the model's files.
            home: this machine's home directory.
        """
        files = [
            f"~/{file.relative_to(home)}" if file.is_relative_to(home) else str(file)
            for file in source.files
        ]
        handshake = Handshake(config=config, files=files)
        self._store.set(FIRST_KEY, msgspec.json.encode(handshake).decode())

    def publish(self, operation: Operation) -> int:
        """Leaves an operation for the other replicas; see `publish_parts`."""
        return self.publish_parts(dict.fromkeys(self.others, operation))[0]

    def publish_parts(self, parts: Mapping[int, Operation]) -> tuple[int, int]:
        """Leaves other replicas operations of their own; waits for nobody.

        Returns:
            its number, and the bytes of the largest.
        """
        number, keys, most = self._number, [], 0
        for replica, operation in parts.items():
            packed = msgspec.msgpack.encode(operation)
            most = max(most, len(packed))
            pieces = [packed[at : at + _PIECE] for at in range(0, len(packed), _PIECE)]
            pieces[0] = b"%d\n" % len(pieces) + pieces[0]
            names = _piece_keys(number, replica, len(pieces))
            # The first is what is waited for: it is set last.
            for name, piece in zip(reversed(names), reversed(pieces), strict=True):
                self._store.set(name, piece)  # type: ignore[arg-type]  # the stub knows str only
            keys += names
        self._keys.append((number, keys))
        self._number += 1
        return number, most

    def forget(self, number: int) -> None:
        """Removes the operations up to `number`, which every replica has read."""
        while self._keys and self._keys[0][0] <= number:
            for key in self._keys.popleft()[1]:
                self._store.delete_key(key)


def receive_run(client: StoreClient) -> tuple[RunConfig, FilesSource]:
    """Reads what `Sender.publish_run` left.

    Raises:
        ValueError: it is another version's.
    """
    config, source = read_run(client.get(FIRST_KEY))
    client.seconds = config.machines.timeout
    return config, source


def read_run(text: str) -> tuple[RunConfig, FilesSource]:
    """Understands what `Sender.publish_run` left; as of `receive_run`."""
    handshake = strict.read(text, Handshake, f"store key {FIRST_KEY!r}")
    return handshake.config, FilesSource.from_strings(handshake.files)


def read_operation(first: bytes, further: Callable[[int], bytes]) -> Operation:
    """Understands what `Sender.publish_parts` left.

    Args:
        first: the first piece, with the number of pieces before it.
        further: gives the others by their numbers, from 1.

    Raises:
        ValueError: it is no operation.
    """
    count, _, head = first.partition(b"\n")
    if not count.isdigit() or not 1 <= len(count) <= 4 or not 1 <= int(count) <= _MOST_PIECES:
        raise ValueError(f"an operation of {count[:20]!r} pieces")
    packed = b"".join([head, *(further(number) for number in range(1, int(count)))])
    try:
        return msgspec.msgpack.decode(packed, type=Operation)
    except RecursionError as error:
        raise ValueError(f"an operation that is nested too deep: {error}") from error


class Saved(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a rank says of its part of a checkpoint's state."""

    files: list[StateFile] = []
    """What it has written."""
    error: str | None = None
    """Why that is not all."""


def report_saved(store: dist.Store, step: int, rank: int, saved: Saved) -> None:
    """Tells rank 0 of this rank's part of a checkpoint's state."""
    store.set(_saved_key(step, rank), msgspec.json.encode(saved).decode())


def collect_saved(
    store: dist.Store,
    step: int,
    ranks: Iterable[int],
    is_gone: Callable[[int], bool],
    timeout: timedelta,
) -> dict[int, Saved]:
    """Waits for what ranks say of a checkpoint's state.

    Args:
        store: where they say it.
        step: the checkpoint's.
        ranks: those.
        is_gone: whether a rank has left an elastic run; it is not waited for then.
        timeout: how long to wait.

    Raises:
        OSError: some have not written theirs in time.
    """
    keys = {rank: _saved_key(step, rank) for rank in ranks}
    until = time.monotonic() + timeout.total_seconds()
    while late := [r for r, key in keys.items() if not store.check([key]) and not is_gone(r)]:
        if time.monotonic() > until:
            who = ", ".join(map(str, late))
            raise OSError(f"rank {who} has not written its state in time")
        with suppress(dist.DistStoreError):
            store.wait([keys[rank] for rank in late], _SLICE)
    saved = {}
    for rank, key in keys.items():
        if store.check([key]):
            saved[rank] = strict.read(store.get(key), Saved, f"store key {key!r}")
            store.delete_key(key)
    return saved


def _saved_key(step: int, rank: int) -> str:
    return f"{FIRST_KEY}/saved/{step}/{rank}"


def hand_on(operation: Operation | None, topology: Topology) -> Operation:
    """Hands an operation on from the first rank of a replica to the others.

    Args:
        operation: on the first rank.
        topology: this rank's place.
    """
    group = topology.host
    if group is None:
        assert operation is not None
        return operation
    packed = None if operation is None else bytearray(msgspec.msgpack.encode(operation))
    size = torch.tensor([0 if packed is None else len(packed)])
    dist.broadcast(size, group=group, group_src=0)
    content = torch.empty(int(size), dtype=torch.uint8)
    if packed is not None:
        content = torch.frombuffer(packed, dtype=torch.uint8)
    dist.broadcast(content, group=group, group_src=0)
    if operation is not None:
        return operation
    return msgspec.msgpack.decode(content.numpy().tobytes(), type=Operation)


class Inbox:
    """A further rank's side: operations in turn.

    The first rank of another replica reads them in a thread as they come: where rank 0 is far away
    they have arrived by the time that they are wanted.

    Args:
        client: the connection to the store.
        topology: this rank's place.
        first: the first operation that is for it.
    """

    def __init__(self, client: StoreClient, topology: Topology, first: int = 0) -> None:
        self._client = client
        self._topology = topology
        self._arrived: queue.SimpleQueue[Operation | Exception] = queue.SimpleQueue()
        if topology.replica > 0 and topology.is_first:
            # A connection of its own: the process group goes on using the other one.
            arguments = (client.clone(), topology.replica, first)
            threading.Thread(
                target=self._read, args=arguments, daemon=True, name="operations"
            ).start()

    def _read(self, store: dist.Store, replica: int, number: int) -> None:
        operation: Operation | None = None
        try:
            while not isinstance(operation, Exit):
                key = _piece_keys(number, replica, 1)[0]
                operation = read_operation(
                    self._client.wait_for(store, key),
                    lambda piece, key=key: self._client.wait_for(store, f"{key}/{piece}"),  # type: ignore[misc]
                )
                self._arrived.put(operation)
                number += 1
        except Exception as error:  # whoever receives raises it
            self._arrived.put(error)

    def next(self) -> Operation:
        """Waits for the next operation."""
        first: Operation | None = None
        if self._topology.is_first:
            arrived = self._arrived.get()
            if isinstance(arrived, Exception):
                raise arrived
            first = arrived
        return hand_on(first, self._topology)


def _piece_keys(number: int, replica: int, count: int) -> list[str]:
    first = f"{FIRST_KEY}/{number}/{replica}"
    return [first, *(f"{first}/{piece}" for piece in range(1, count))]
