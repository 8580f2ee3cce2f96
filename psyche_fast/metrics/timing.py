"""Wall-clock seconds by phase of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the seconds that a step spends in each named phase.

        timer = PhaseTimer()
        with timer.phase("forward_backward"):
            ...
        seconds = timer.take()   # {"forward_backward": 0.81}

    A phase inside a phase is counted once, under the inner name: the outer one stops while the
    inner one runs, so the values always sum to no more than the wall-clock time.

    The clock is the host's and nothing waits for a GPU: work queued on a CUDA stream is charged to
    the phase in which the host next waits for it. A synchronisation per phase would cost the
    overlap that the step is built on; use a profiler for times on the device.

    Not safe for use from several threads: one timer belongs to one step loop.

    Args:
        clock: Returns seconds, never going backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @property
    def current(self) -> str | None:
        """The innermost phase that is open; another thread may ask too."""
        phases = self._open[-1:]
        return phases[0] if phases else None

    def _charge(self) -> None:
        """Charges the time since the last change to the innermost open phase."""
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the block to `name`; an exception inside is charged as well and passes on."""
        self._charge()
        self._open.append(name)
        try:
            yield
        except Exception as error:
            if not getattr(error, "__notes__", None):  # the innermost phase says it
                error.add_note(f"in phase {name}")
            raise
        finally:
            self._charge()
            popped = self._open.pop()
            assert popped == name, f"phase {name} closed while {popped} was open"

    def take(self) -> dict[str, float]:
        """Returns the seconds by phase since the last call and starts again from zero.

        Phases that are open go on, and what they have used until now is in the result.
        """
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds
