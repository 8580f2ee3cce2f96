"""The lines of `metrics.jsonl`, each written during the step after its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psyche_fast.metrics import PhaseTimer
from psyche_fast.rank.counts import Totals


@dataclass(frozen=True)
class _Line:
    totals: Totals
    grad_norm: Tensor
    stats: Mapping[str, Tensor]
    fields: Mapping[str, Any]
    seconds: Mapping[str, float]


class Lines:
    """Holds a step's line back until the other ranks' part of it has come.

    Args:
        report: takes the lines in turn.
        timer: the step's; waiting is its phase `counts`.
    """

    def __init__(self, report: Callable[[dict[str, Any]], None], timer: PhaseTimer) -> None:
        self._report = report
        self._timer = timer
        self._held: _Line | None = None

    def hold(
        self,
        totals: Totals,
        grad_norm: Tensor,
        stats: Mapping[str, Tensor],
        fields: Mapping[str, Any],
    ) -> None:
        """Keeps the line of a step that has been trained, and the seconds of its phases."""
        assert self._held is None, "one line at a time"
        self._held = _Line(totals, grad_norm, stats, fields, self._timer.take())

    def write(self, *, checkpoint: bool = False) -> None:
        """Writes the line that is held, if one is; waits for the ranks and the device.

        Args:
            checkpoint: the step's own checkpoint has followed it: its time is the step's.
        """
        line, self._held = self._held, None
        if line is None:
            return
        with self._timer.phase("counts"):
            counts = line.totals.wait()
        seconds = dict(line.seconds)
        if checkpoint:
            for phase, more in self._timer.take().items():
                seconds[phase] = seconds.get(phase, 0.0) + more
        stats = {name: float(value) for name, value in line.stats.items()}
        self._report(
            {
                "step": line.fields["step"],
                "loss": counts.loss,
                "grad_norm": float(line.grad_norm),
                **line.fields,
                "seconds": seconds,
                "bytes_sent": counts.bytes_sent,
                "nonfinite_losses": counts.nonfinite_losses,
                "refused_gradients": counts.refused_gradients,
                **({"optim_stats": stats} if stats else {}),
            }
        )
