"""What a run tells about itself: a line per step, progress, phase times, memory, plots, trackers.

Everything here is light to import: matplotlib and the trackers are imported by the functions that
need them.
"""

from psyche_fast.metrics.console import Console
from psyche_fast.metrics.memory import memory_bytes
from psyche_fast.metrics.plots import plot_run
from psyche_fast.metrics.psyche_names import PsycheNames
from psyche_fast.metrics.timing import PhaseTimer
from psyche_fast.metrics.trackers import Tracker, flatten, make_tracker
from psyche_fast.metrics.writer import MetricsWriter, read_metrics

__all__ = [
    "Console",
    "MetricsWriter",
    "PhaseTimer",
    "PsycheNames",
    "Tracker",
    "flatten",
    "make_tracker",
    "memory_bytes",
    "plot_run",
    "read_metrics",
]
