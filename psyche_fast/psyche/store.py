"""What a sidecar reads from the store of Psyche's core: the only file that knows its keys.

Keys: `architecture`; `source` with `files`, or `config`, `tensor_names`, `tensor_shape_NAME` and
`tensor_dtype_NAME`; `dp`; `tp`. Operations are numbered from 0, and all ranks meet in a barrier
after each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from psyche_fast import strict
from psyche_fast.models.source import FilesSource, ModelSource, TensorsSource
from psyche_fast.psyche.messages import Operation, decode
from psyche_fast.psyche.tensors import receive_tensors
from psyche_fast.start.store import StoreClient, barrier

FIRST_KEY = "architecture"
"""The key by which a core is known to be Psyche's."""


class PsycheStore:
    """One rank's view of the store.

    Args:
        client: the connection.
        device: this rank's, for barriers and tensors.
    """

    def __init__(self, client: StoreClient, device: torch.device) -> None:
        self._get = client.get
        self._device = device
        self._number = 0

    def receive_model(self) -> tuple[str, ModelSource]:
        """Reads architecture and source; the process group is up by now.

        Raises:
            ValueError: an unknown source, or malformed keys.
        """
        architecture = self._get(FIRST_KEY)
        kind = self._get("source")
        if kind == "files":
            files = strict.read(self._get("files"), list[str], "store key 'files'")
            return architecture, FilesSource.from_strings(files)
        if kind != "config_and_tensors":
            raise ValueError(
                f"store key 'source': wanted 'files' or 'config_and_tensors', got {kind!r}"
            )
        meet: Callable[[], None] = lambda: barrier(self._device)  # noqa: E731 - one use, one line
        meet()
        config = self._get("config")
        names = strict.read(self._get("tensor_names"), list[str], "store key 'tensor_names'")
        tensors = receive_tensors(self._get, names, self._device, meet)
        return architecture, TensorsSource(config, tensors)

    def receive_parallelism(self) -> tuple[int, int]:
        """Reads `dp` and `tp`.

        Raises:
            ValueError: a value is not a positive number.
        """
        return self._positive("dp"), self._positive("tp")

    def _positive(self, key: str) -> int:
        text = self._get(key)
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"store key {key!r}: wanted a positive number, got {text!r}")
        return int(text)

    def receive(self) -> Operation:
        """Waits for the next operation and meets all ranks in its barrier.

        Raises:
            ValueError: the operation is not one of the protocol's.
        """
        number = self._number
        text = self._get(str(number))
        self._number += 1
        # The barrier comes first: a malformed operation is refused by all ranks, not waited for.
        barrier(self._device)
        return decode(text, number)
