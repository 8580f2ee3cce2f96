"""The store that rank 0 hosts: the only file that knows its keys.

Keys: ``architecture``; ``source`` with ``files``, or ``config``, ``tensor_names``,
``tensor_shape_NAME`` and ``tensor_dtype_NAME``; ``dp``; ``tp``; ours ``replicas`` and
``psyche_fast_settings`` (absent: Psyche's behaviour). Operations are numbered from 0. Psyche's
core sets ``N`` and meets all ranks in a barrier; ours sets ``N/REPLICA`` ahead of time, for every
replica that has sidecars: the number of pieces, the operation and its part of the batch, with
further pieces in ``N/REPLICA/1`` and so on. They are deleted once every rank has read them, so that
their number does not grow with the run.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from psyche_fast import strict
from psyche_fast.models.source import FilesSource, ModelSource, TensorsSource
from psyche_fast.psyche.messages import Exit, Operation, Settings, decode, encode
from psyche_fast.psyche.tensors import receive_tensors, send_tensors

log = logging.getLogger("psyche_fast.sidecar")

_REPLICAS = "replicas"
_SETTINGS = "psyche_fast_settings"
_SLICE = timedelta(seconds=0.5)
_PIECE = 4 << 20
"""The most bytes in one value: TCPStore refuses those of more than 8 MiB."""


def barrier(device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Meets all ranks: after each operation of Psyche's core, and before our core's store ends."""
    nccl = device.type == "cuda" and group is None
    dist.barrier(group, device_ids=[device.index] if nccl else None)


class CoreStore:
    """Rank 0's side: hosts the store and publishes operations."""

    def __init__(self, sock: socket.socket, world_size: int, timeout: timedelta) -> None:
        """Takes over ``sock``, which ``listen`` opened."""
        host, port = sock.getsockname()[:2]
        self.store = dist.TCPStore(
            host_name=host,
            port=port,
            world_size=world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            use_libuv=True,
            master_listen_fd=sock.detach(),
        )
        self._number = 0
        self.readers: list[int] = []
        """Replicas that have sidecars."""
        self._keys: deque[tuple[int, list[str]]] = deque()

    def publish_model(
        self,
        architecture: str,
        source: ModelSource,
        dp: int,
        tp: int,
        settings: Settings,
        home: str,
    ) -> None:
        """Sets every key of the handshake but the tensors of a ``TensorsSource``.

        Args:
            architecture: ``HfAuto`` or another registered name.
            source: the model's files, or its configuration and tensors.
            dp: data parallelism.
            tp: tensor parallelism.
            settings: ours beyond Psyche's.
            home: home directory, written ``~`` in paths so that other machines find their own.
        """
        # Replica 0's first rank is the core: it reads nothing.
        first = 0 if dp * tp > 1 else 1
        self.readers = list(range(first, settings.replicas or 1))
        # Ours go first: who has read ``tp`` may rely on them.
        if settings.replicas is not None:
            self.store.set(_REPLICAS, str(settings.replicas))
        self.store.set(_SETTINGS, msgspec.json.encode(settings).decode())
        self.store.set("dp", str(dp))
        self.store.set("tp", str(tp))
        self.store.set("architecture", architecture)
        if isinstance(source, FilesSource):
            files = [str(path) for path in source.files]
            prefix = home.rstrip("/") + "/"
            files = ["~/" + f[len(prefix) :] if f.startswith(prefix) else f for f in files]
            self.store.set("source", "files")
            self.store.set("files", json.dumps(files))
        else:
            self.store.set("config", source.config_json)
            self.store.set("tensor_names", json.dumps(sorted(source.tensors)))
            self.store.set("source", "config_and_tensors")

    def send_model(self, source: ModelSource, device: torch.device) -> None:
        """Sends a ``TensorsSource``'s tensors; the process group is there by now."""
        if isinstance(source, TensorsSource):
            send_tensors(self.store, source.tensors, device, lambda: barrier(device))

    def publish(self, operation: Operation) -> int:
        """Leaves an operation for all replicas and returns its number; waits for nobody."""
        return self.publish_parts(dict.fromkeys(self.readers, (operation, b"")))

    def publish_parts(self, parts: Mapping[int, tuple[Operation, bytes]]) -> int:
        """Leaves an operation with a batch of its own for each replica; waits for nobody.

        Args:
            parts: for each of ``readers`` its operation and its packed batch.
        """
        assert parts.keys() == set(self.readers)
        number, keys = self._number, []
        for replica, (operation, packed) in parts.items():
            whole = encode(operation).encode() + b"\n" + packed
            pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
            pieces[0] = b"%d\n" % len(pieces) + pieces[0]
            names = _piece_keys(number, replica, len(pieces))
            # The first is what a sidecar waits for: it is set last.
            for name, piece in zip(reversed(names), reversed(pieces), strict=True):
                self.store.set(name, piece)  # type: ignore[arg-type]  # the stub knows str only
            keys += names
        self._keys.append((number, keys))
        self._number += 1
        return number

    def forget(self, number: int) -> None:
        """Removes the operations up to ``number``, which every rank has read."""
        while self._keys and self._keys[0][0] <= number:
            for key in self._keys.popleft()[1]:
                self.store.delete_key(key)


class SidecarStore:
    """A further rank's side. Waits in short slices, so that a signal or a lost store ends it.

    A store whose machine is cut off answers nothing, not even the end of a slice, and torch would
    wait for the kernel to give up (a quarter of an hour): a thread ends this process then.
    """

    def __init__(self, host: str, port: int, world_size: int, timeout: timedelta) -> None:
        """Connects to the store on rank 0.

        Raises:
            ValueError: nobody answers within ``timeout``.
        """
        try:
            self.store = dist.TCPStore(
                host_name=host,
                port=port,
                world_size=world_size,
                is_master=False,
                timeout=timeout,
                use_libuv=True,
            )
        except dist.DistError as error:
            raise ValueError(f"--init-method: no store answers at {host}:{port}") from error
        self._number = 0
        self._ahead: queue.SimpleQueue[tuple[Operation, bytes] | Exception] | None = None
        self._seconds = timeout.total_seconds()
        self._asked_at: float | None = None
        threading.Thread(target=self._watch, daemon=True, name="store-watch").start()

    def _get(self, key: str) -> str:
        return self._value(self.store, key).decode()

    def _value(self, store: dist.Store, key: str) -> bytes:
        try:
            while True:
                self._asked_at = time.monotonic()
                try:
                    store.wait([key], _SLICE)
                except dist.DistStoreError:
                    continue
                return bytes(store.get(key))
        finally:
            self._asked_at = None

    def _watch(self) -> None:
        while True:
            time.sleep(_SLICE.total_seconds() / 2)
            asked = self._asked_at
            if asked is not None and time.monotonic() - asked > self._seconds:
                log.error(
                    "lost another rank: the core's store has not answered for %g s", self._seconds
                )
                os._exit(1)

    def _optional(self, key: str) -> str | None:
        return self._get(key) if self.store.check([key]) else None

    def receive_model(self, device: torch.device) -> tuple[str, ModelSource]:
        """Reads architecture and source; the process group is there by now.

        Raises:
            ValueError: an unknown source, or malformed keys.
        """
        architecture = self._get("architecture")
        kind = self._get("source")
        if kind == "files":
            files = strict.convert(
                strict.loads(self._get("files"), "store key 'files'"), list[str], "files"
            )
            return architecture, FilesSource.from_strings(files)
        if kind != "config_and_tensors":
            raise ValueError(
                f"store key 'source': wanted 'files' or 'config_and_tensors', got {kind!r}"
            )
        meet: Callable[[], None] = lambda: barrier(device)  # noqa: E731 - one use, one line
        meet()
        config = self._get("config")
        names = strict.convert(
            strict.loads(self._get("tensor_names"), "store key 'tensor_names'"),
            list[str],
            "tensor_names",
        )
        return architecture, TensorsSource(config, receive_tensors(self._get, names, device, meet))

    def receive_parallelism(self) -> tuple[int, int, Settings]:
        """Reads ``dp``, ``tp`` and ours beyond them.

        Raises:
            ValueError: a value is not a positive number, or an unknown setting.
        """
        dp, tp = (_positive(key, self._get(key)) for key in ("dp", "tp"))
        text = self._optional(_SETTINGS)
        settings = Settings()
        if text is not None:
            settings = strict.convert(strict.loads(text, _SETTINGS), Settings, _SETTINGS)
        replicas = self._optional(_REPLICAS)
        if replicas is not None:
            settings = msgspec.structs.replace(settings, replicas=_positive(_REPLICAS, replicas))
        if settings.timeout is not None:
            self._seconds = settings.timeout
        return dp, tp, settings

    def read_ahead(self, replica: int) -> None:
        """Reads operations of our core from now on as they come, in a thread until ``exit``.

        Where rank 0 is far away they have arrived by the time that they are wanted.
        """
        self._ahead = queue.SimpleQueue()
        # A connection of its own: the process group goes on using the other one.
        store = self.store.clone()  # type: ignore[attr-defined]  # not in the stub
        arguments = (store, replica, self._ahead)
        threading.Thread(target=self._read, args=arguments, daemon=True, name="operations").start()

    def _read(
        self,
        store: dist.Store,
        replica: int,
        into: queue.SimpleQueue[tuple[Operation, bytes] | Exception],
    ) -> None:
        number = 0
        try:
            while True:
                count, _, first = self._value(store, f"{number}/{replica}").partition(b"\n")
                further = _piece_keys(number, replica, int(count))[1:]
                whole = b"".join([first, *(self._value(store, key) for key in further)])
                text, _, packed = whole.partition(b"\n")
                operation = decode(text, number)
                into.put((operation, packed))
                if isinstance(operation, Exit):
                    return
                number += 1
        except Exception as error:  # whoever receives raises it
            into.put(error)

    def receive(self, device: torch.device) -> tuple[Operation, bytes]:
        """Waits for the next operation; with Psyche's core, meets all ranks in the barrier.

        Returns:
            the operation and, with our core, this replica's batch; see ``unpack_batch``.

        Raises:
            ValueError: the operation is not one of the protocol's.
        """
        if self._ahead is not None:
            found = self._ahead.get()
            if isinstance(found, Exception):
                raise found
            return found
        number = self._number
        text = self._get(str(number))
        self._number += 1
        # The barrier comes first: a malformed operation is refused by all ranks, not waited for.
        barrier(device)
        return decode(text, number), b""


def _piece_keys(number: int, replica: int, count: int) -> list[str]:
    first = f"{number}/{replica}"
    return [first, *(f"{first}/{piece}" for piece in range(1, count))]


def _positive(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"store key {key!r}: wanted a positive number, got {text!r}")
    return int(text)
