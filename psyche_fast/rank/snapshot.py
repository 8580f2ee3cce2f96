"""A copy of a rank's state in host memory, made while the next step computes its gradients.

In that time neither parameters nor the optimiser's state change, so that a thread can read them
beside the forward and backward: a step waits for the copy only where that takes longer. No
collective is in the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from psyche_fast.distro import replicas
from psyche_fast.rank.state import Piece, State


class Snapshot:
    """Copies pieces, and hashes tensors for the check that replicas are the same.

    Args:
        step: whose state it is.
        then: takes the copies by file, or what went wrong, when `hand_over` is called.
        early: pieces by file that have been copied by now.
    """

    def __init__(
        self,
        step: int,
        then: Callable[[dict[str, State] | Exception], None],
        early: Mapping[str, State],
    ) -> None:
        self.step, self._then, self._early = step, then, early
        self.hashes: list[Tensor] = []
        self._copies: dict[str, State] = {}
        self._failed: Exception | None = None
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None

    def begin(
        self,
        files: Mapping[str, State],
        hashed: Sequence[Sequence[Tensor]],
        device: torch.device,
    ) -> None:
        """Begins; nothing that is given changes until `wait`.

        Args:
            files: the pieces by file.
            hashed: tensors whose hashes are wanted, in groups.
            device: where they lie.
        """
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        arguments = files, hashed, device, ready
        self._thread = threading.Thread(
            target=self._work, args=arguments, daemon=True, name="snapshot"
        )
        self._thread.start()

    def _work(
        self,
        files: Mapping[str, State],
        hashed: Sequence[Sequence[Tensor]],
        device: torch.device,
        ready: torch.cuda.Event | None,
    ) -> None:
        try:
            stream = None if ready is None else torch.cuda.Stream(device)
            # On a GPU beside the forward and backward, which a copy in their stream would hold up.
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                self.hashes = [replicas.hashed(tensors) for tensors in hashed]
                for name, pieces in files.items():
                    self._copies[name] = self._copied(pieces)
            if stream is not None:
                stream.synchronize()
        except Exception as error:  # whoever waits raises it
            self._broken = error

    def _copied(self, pieces: State) -> dict[str, Piece]:
        copies = {}
        try:
            for name, piece in pieces.items():
                copies[name] = piece.on_host(copy=True)
        except (MemoryError, RuntimeError) as error:  # no memory for it is no reason to end a run
            self._failed = error
            return {}
        return copies

    def wait(self) -> None:
        """Waits for the copies: from here on what was given may change.

        Raises:
            Exception: what went wrong in hashing, which all ranks have to do.
        """
        assert self._thread is not None
        self._thread.join()
        if self._broken is not None:
            raise self._broken

    def hand_over(self, name: str, late: State) -> None:
        """Gives the copies away, once it is known that they are worth it.

        Args:
            name: a file.
            late: further pieces of it, which nothing changes.
        """
        copies, self._copies = self._copies, {}
        if self._failed is None:
            copies = {file: {**own, **self._early[file]} for file, own in copies.items()}
            copies[name] = {**copies[name], **late}
        self._then(self._failed or copies)
