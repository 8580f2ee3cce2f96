"""The lines of `metrics.jsonl`, each written during the step after its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from psyche_fast.metrics import PhaseTimer
from psyche_fast.rank.counts import Totals


@dataclass
class Lines:
    """Holds a step's line back until the other ranks' part of it has come.

    Args:
        report: takes the lines in turn.
        timer: the step's; waiting is its phase `counts`.
    """

    report: Callable[[dict[str, Any]], None]
    timer: PhaseTimer
    _held: tuple[Totals, dict[str, Any]] | None = field(default=None, init=False)

    def hold(self, totals: Totals, fields: Mapping[str, Any]) -> None:
        """Keeps the line of a step that has been trained, and the seconds of its phases.

        Args:
            totals: the step's counts.
            fields: further fields; 0-d tensors are read when the line is written. Of an elastic
                run `rows`, those of each replica, of which the lost ones are counted.
        """
        assert self._held is None, "one line at a time"
        self._held = totals, {**fields, "seconds": self.timer.take()}

    def add(self, fields: Mapping[str, Any]) -> None:
        """Adds to the line that is held: what was found out after its step, and its seconds."""
        assert self._held is not None
        line = self._held[1]
        line |= fields
        for phase, more in self.timer.take().items():
            line["seconds"][phase] = line["seconds"].get(phase, 0.0) + more

    def write(self, *, checkpoint: bool = False) -> None:
        """Writes the line that is held, if one is; waits for the ranks and the device.

        Args:
            checkpoint: the step's own checkpoint has followed it: its time is the step's.
        """
        if self._held is None:
            return
        (totals, fields), self._held = self._held, None
        with self.timer.phase("counts"):
            counts = totals.wait()
        if checkpoint:
            seconds = fields["seconds"]
            for phase, more in self.timer.take().items():
                seconds[phase] = seconds.get(phase, 0.0) + more
        rows = fields.pop("rows", None)
        if rows is not None:
            assert totals.replicas is not None
            kept = sum(n for replica, n in rows.items() if replica in totals.replicas)
            lost = sum(rows.values()) - kept
            fields |= {"epoch": totals.epoch, "members": len(totals.replicas), "lost_rows": lost}
        self.report(_plain({"step": fields["step"], **asdict(counts), **fields}))


def _plain(value: Any) -> Any:
    """Numbers instead of tensors."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return float(value) if isinstance(value, Tensor) else value
