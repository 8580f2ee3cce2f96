"""Checkpoints on their way elsewhere while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from psyche_fast.start.signals import also_at_exit_now

log = logging.getLogger("psyche_fast.core")


class Uploads:
    """Uploads checkpoints in a thread, one at a time.

    Where an upload takes longer than the steps between two checkpoints, the newest one that waits
    is next, and those before it are left out. What fails is said and is no reason to end a run.

    Args:
        flag: what asks for it, for errors.
        target: where to, in words.
        tell: takes lines for the user, from any thread.
    """

    def __init__(self, flag: str, target: str, tell: Callable[[str], None]) -> None:
        self._flag, self._target, self._tell = flag, target, tell
        self._changed = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._current: tuple[int, Path] | None = None
        self._closed = False
        # A daemon: whoever ends the program at once need not wait for it.
        self._thread = threading.Thread(target=self._work, daemon=True, name="uploads")
        self._thread.start()

    def prepare(self) -> None:
        """What can be done before there is a checkpoint; raises what it likes."""

    def upload(self, step: int, path: Path) -> None:
        """Uploads a step's checkpoint; raises what it likes."""
        raise NotImplementedError

    def by_hand(self, path: Path) -> str:
        """How to do it by hand: a command, or words."""
        raise NotImplementedError

    @property
    def busy(self) -> set[Path]:
        """Checkpoints that are being uploaded or wait to be."""
        with self._changed:
            return {pair[1] for pair in (self._current, self._waiting) if pair is not None}

    def push(self, step: int, path: Path) -> None:
        """Has a checkpoint uploaded."""
        with self._changed:
            left_out, self._waiting = self._waiting, (step, path)
            self._changed.notify_all()
        if left_out is not None:
            log.info("checkpoint of step %d not uploaded: a newer one is there", left_out[0])

    def finish(self) -> None:
        """Waits for what is under way; Ctrl-C leaves it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._say_of_the_newest("uploading to {}; Ctrl-C ends that, to finish it later: {}")
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.abandon()

    def abandon(self) -> None:
        """Says how to go on with what has not been uploaded, if anything."""
        self._say_of_the_newest("not uploaded to {}; to finish it: {}")

    def _say_of_the_newest(self, text: str) -> None:
        with self._changed:
            newest = self._waiting or self._current
        if newest is not None:
            self._tell(text.format(self._target, self.by_hand(newest[1])))

    def _work(self) -> None:
        # At once: whoever has no right to upload hears of it while he can still do something.
        self._try("cannot be created", self.prepare)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                self._current, self._waiting = self._waiting, None
                step, path = self._current

            def upload(step: int = step, path: Path = path) -> None:
                self.upload(step, path)

            if self._try(f"checkpoint of step {step} not uploaded", upload, path):
                self._tell(f"checkpoint of step {step} uploaded to {self._target}")
            with self._changed:
                self._current = None

    def _try(self, what: str, action: Callable[[], object], path: Path | None = None) -> bool:
        try:
            action()
        # Clients' errors share no base class: HTTP, cache and disk each have theirs.
        except Exception as error:
            said = str(error).strip()
            reason = said.splitlines()[0] if said else repr(error)
            with self._changed:
                newer = self._waiting is not None
            if path is not None:
                reason += "; a newer one is next" if newer else f"; by hand: {self.by_hand(path)}"
            self._tell(f"{self._flag} {self._target}: {what}: {reason}")
            log.warning("%s: %s", self._target, what, exc_info=True, extra={"is_told": True})
            return False
        return True


@contextmanager
def waited_for(uploads: Uploads) -> Iterator[None]:
    """Uploads go on while the block runs, and are then waited for.

    After an error, or when the program is ended at once, it is said what is left to do.
    """
    with also_at_exit_now(uploads.abandon):
        try:
            yield
        except BaseException:
            uploads.abandon()
            raise
        uploads.finish()
