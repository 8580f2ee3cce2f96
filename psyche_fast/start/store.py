"""The store that rank 0 hosts and through which its ranks first hear of it.

What its keys mean is the protocol's affair: `rank.protocol` is our core's, `psyche` Psyche's.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from psyche_fast import strict
from psyche_fast.start import knock, relay
from psyche_fast.start.devices import Processor

log = logging.getLogger("psyche_fast.sidecar")

_SLICE = timedelta(seconds=0.5)
_STOPPED = 2.0
"""Seconds between two looks at the clock, from which on this process did not run meanwhile."""
_LOOKS = (0.01, 0.25)
"""Seconds between two looks for a key: the first, and the most that they grow to."""


def host_store(sock: socket.socket, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """The store on a socket that `network.listen` opened, which it takes over."""
    host, port = sock.getsockname()[:2]
    return dist.TCPStore(
        host_name=host,
        port=port,
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        use_libuv=True,
        master_listen_fd=sock.detach(),
    )


def barrier(device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Meets all ranks."""
    nccl = device.type == "cuda" and group is None
    dist.barrier(group, device_ids=[device.index] if nccl else None)


def introduce(store: dist.Store, rank: int, processor: Processor, life: str = "") -> None:
    """Says what a further rank computes on; Psyche's core does not look at it.

    Args:
        store: the core's.
        rank: this one's.
        processor: that it computes on.
        life: which one this is of a rank that may come back while the others go on.

    Raises:
        RuntimeError: the rank has been here. What it said is still in the store, and those that
            act on it would wait for a process that is gone.
    """
    if store.add(f"met/{rank}/{life}", 1) > 1:
        raise RuntimeError(
            f"rank {rank} is there already, or has been lost and its core is about to end "
            "(--start-rank of two machines, or started again too soon)"
        )
    store.set(_processor_key(rank), msgspec.json.encode(processor).decode())


def processors(store: dist.Store, world_size: int, timeout: timedelta) -> list[Processor]:
    """Waits for the further ranks; what they compute on, in the order of their ranks from 1.

    Raises:
        RuntimeError: some have not come in time.
    """
    keys = [_processor_key(rank) for rank in range(1, world_size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        late = [str(rank) for rank, key in enumerate(keys, 1) if not store.check([key])]
        raise RuntimeError(f"timed out waiting for the start of rank {', '.join(late)}") from None
    return [read_processor(store, rank) for rank in range(1, world_size)]


def read_processor(store: dist.Store, rank: int) -> Processor:
    """What a rank that has introduced itself computes on."""
    key = _processor_key(rank)
    return strict.read(store.get(key), Processor, f"store key {key!r}")


def _processor_key(rank: int) -> str:
    return f"processor/{rank}"


class StoreClient:
    """A further rank's side. Waits in short slices, so that a signal or a lost store ends it.

    A store whose machine is cut off answers nothing, not even the end of a slice, and torch would
    wait for the kernel to give up (a quarter of an hour): a thread ends this process then.

    Attributes:
        store: torch's.
        seconds: how long the store may take to answer.
    """

    def __init__(
        self,
        host: str,
        port: int,
        world_size: int,
        timeout: timedelta,
        *,
        rank: int = 0,
        secret: bytes | None = None,
    ) -> None:
        """Connects to the store, which has to answer within `timeout`.

        Args:
            host: where it listens, or the door before it.
            port: likewise.
            world_size: all ranks.
            timeout: see above.
            rank: this one, for the door.
            secret: lets it in there; None where there is no door.

        Raises:
            ValueError: no store answers, or a door does not let this rank in.
        """
        if secret is not None:
            way = relay.Relay(host, port, secret, rank, timeout.total_seconds())
            host, port = "127.0.0.1", way.local
        elif not knock.is_own_machine(host) and host not in ("0.0.0.0", "::"):
            relay.refuse_if_shut(host, port, timeout.total_seconds())
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
        self.seconds = timeout.total_seconds()
        self._asked: dict[int, float] = {}
        threading.Thread(target=self._watch, daemon=True, name="store-watch").start()

    def clone(self) -> dist.Store:
        """A connection of its own, for another thread to wait on with `wait_for`."""
        store: dist.Store = self.store.clone()  # type: ignore[attr-defined]  # not in the stub
        return store

    def get(self, key: str) -> str:
        """Waits for a key; its value as text."""
        return self.wait_for(self.store, key).decode()

    def wait_for(self, store: dist.Store, key: str) -> bytes:
        """Waits for a key on one of this rank's connections."""
        while True:
            with self.asking():
                try:
                    store.wait([key], _SLICE)
                except dist.DistStoreError:
                    continue
                return bytes(store.get(key))

    def first_of(self, keys: Sequence[str]) -> str:
        """Waits until one of several keys is set, and says which."""
        pause, most = _LOOKS
        while True:
            with self.asking():
                for key in keys:
                    if self.store.check([key]):
                        return key
            time.sleep(pause)
            pause = min(2 * pause, most)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ends this process where the block, which asks the store, takes longer than `seconds`."""
        thread = threading.get_ident()
        self._asked[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._asked[thread]

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(_SLICE.total_seconds() / 2)
            now, before = time.monotonic(), looked
            looked = now
            if now - before > _STOPPED:  # it is this process that was stopped
                for thread in list(self._asked):
                    self._asked[thread] = now
            if now - min(list(self._asked.values()), default=math.inf) > self.seconds:
                log.error(
                    "lost another rank: the core's store has not answered for %g s", self.seconds
                )
                os._exit(1)
