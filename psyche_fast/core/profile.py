"""Some steps of a run under a profiler: where their time goes, and what holds memory.

Rank 0's is looked at. Nothing of this costs a run that is not profiled: ranges are put around a
trainer's parts and the kernels' calls when a profile begins, and are taken off when it ends.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import emit_nvtx, record_function

from psyche_fast import kernels
from psyche_fast.compat import dump_memory_snapshot, record_memory_history
from psyche_fast.core.plan import Plan
from psyche_fast.kernels.backends import explain, implementation
from psyche_fast.metrics import PhaseTimer
from psyche_fast.rank.trainer import Trainer

BEFORE, AFTER = 2, 1
"""Steps that are trained besides: two warm up (kernels are compiled, the profiler begins), the last
one ends with a checkpoint as a run does."""
_KINDS = ("phase", "rank", "kernel")
_STEP = "ProfilerStep"
_PARTS = ("look_ahead", "receive", "after_backward", "step")


class _RangedTimer(PhaseTimer):
    """Phases that a profiler sees too."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As of `PhaseTimer`."""
        with record_function(f"phase: {name}"), super().phase(name):
            yield


class Profile:
    """A profile of `steps` steps of one run.

    Args:
        steps: how many.
        folder: takes `trace.json` (for Perfetto, or `chrome://tracing`) and, of a CUDA device,
            `memory.pickle` (for pytorch.org/memory_viz).
        nvtx: ranges for Nsight Systems in place of the trace; `nsys profile -c cudaProfilerApi`
            then records just these steps.

    Raises:
        ValueError: `nvtx` where there is no CUDA device.
    """

    def __init__(self, steps: int, folder: Path, *, nvtx: bool) -> None:
        if nvtx and not torch.cuda.is_available():
            raise ValueError("--nvtx: ranges for Nsight Systems want a CUDA device; leave it out")
        self._steps, self._folder, self._nvtx = steps, folder, nvtx
        self._seen = 0
        self._profiler: torch.profiler.profile | None = None
        self._marking = ExitStack()
        self._lines: list[str] = []
        self.timer: PhaseTimer = _RangedTimer()

    def part(self, plan: Plan) -> Plan:
        """As many of a run's next steps as it takes."""
        last = plan.config.schedule.start_step - 1 + BEFORE + self._steps + AFTER
        changes = {"total_steps": last, "total_tokens": None, "max_time": None}
        return dataclasses.replace(
            plan, config=plan.config.replace(**changes), resolved=plan.resolved.replace(**changes)
        )

    @contextmanager
    def over(self, trainer: Trainer) -> Iterator[None]:
        """Looks on while the block trains; `step` has to be called after each step."""
        device = trainer.model.device
        cuda = device.type == "cuda"
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, self._marking:
            stack.enter_context(_ranges(trainer))
            if cuda:
                record_memory_history(True)
                stack.callback(record_memory_history, False)
            if not self._nvtx:
                activities = [torch.profiler.ProfilerActivity.CPU]
                activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
                self._profiler = stack.enter_context(
                    torch.profiler.profile(
                        activities=activities,
                        schedule=torch.profiler.schedule(
                            wait=BEFORE - 1, warmup=1, active=self._steps, repeat=1
                        ),
                        on_trace_ready=self._ready,
                        record_shapes=True,
                        acc_events=True,  # there is one cycle; torch 2.11 warns otherwise
                    )
                )
            yield
            if cuda:
                path = self._folder / "memory.pickle"
                dump_memory_snapshot(path)
                self._lines.append(f"memory      {path} (https://pytorch.org/memory_viz shows it)")
            else:
                self._lines.append("memory      snapshots are of CUDA devices alone")

    def step(self) -> None:
        """A step has been trained."""
        self._seen += 1
        if self._profiler is not None:
            self._profiler.step()
        elif self._seen == BEFORE:
            torch.cuda.profiler.start()
            self._marking.callback(torch.cuda.profiler.stop)
            self._marking.enter_context(emit_nvtx())
        elif self._seen == BEFORE + self._steps:
            self._marking.close()

    def lines(self) -> list[str]:
        """What it has come to, for the terminal."""
        return list(self._lines)

    def _ready(self, profiler: torch.profiler.profile) -> None:
        path = self._folder / "trace.json"
        profiler.export_chrome_trace(str(path))
        self._lines += table(profiler.key_averages(), self._steps)
        self._lines.append(f"trace       {path} (https://ui.perfetto.dev shows it)")


def table(averages: Any, steps: int) -> list[str]:
    """A line for each range: calls, milliseconds of host and device in a step, share of the step.

    Args:
        averages: the profiler's, by name.
        steps: how many steps they are of.
    """
    found = [a for a in averages if a.key.partition(":")[0] in _KINDS and ": " in a.key]
    found.sort(key=lambda a: (_KINDS.index(a.key.partition(":")[0]), -a.cpu_time_total))
    # On a GPU the profiler tells a range twice, as the host and as the device saw it.
    rows: dict[str, list[float]] = {}
    for one in found:
        row = rows.setdefault(one.key, [0.0, 0.0, 0.0])
        row[0] = max(row[0], one.count / steps)
        row[1] += one.cpu_time_total / 1e3 / steps
        row[2] = max(row[2], one.device_time_total / 1e3 / steps)
    whole = sum(a.cpu_time_total for a in averages if a.key.startswith(_STEP)) / 1e3 / steps
    lines = [
        f"profile     {steps} steps of {whole:.1f} ms, of rank 0; ranges are within each other",
        f"{'':<34} {'calls':>7} {'host ms':>10} {'device ms':>10} {'% of step':>9}",
    ]
    for name, (calls, host, device) in rows.items():
        lines.append(
            f"{name:<34} {calls:7.1f} {host:10.2f} {device:10.2f} {100 * host / whole:9.1f}"
        )
    return lines


@contextmanager
def _ranges(trainer: Trainer) -> Iterator[None]:
    """Puts named ranges around what a rank does in a step, for as long as the block runs."""
    with ExitStack() as stack:
        optimizer = trainer._optimizer
        _around(stack, trainer.model, "loss", "rank: forward")
        _around(stack, trainer, "_forward_backward", "rank: forward and backward")
        for name in _PARTS:
            _around(stack, optimizer, name, f"rank: optimizer.{name}")
        backend, _ = explain(trainer.model.device)
        public = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
        plain = str(Path(kernels.__path__[0], "reference"))
        for operation in (module.name for module in pkgutil.iter_modules([plain])):
            if operation in public:
                for name in {backend, "torch"}:
                    _around_calls(stack, implementation(name, operation), operation)
        yield


def _around_calls(stack: ExitStack, module: types.ModuleType, operation: str) -> None:
    for name, function in list(vars(module).items()):
        own = isinstance(function, types.FunctionType) and function.__module__ == module.__name__
        if own and not name.startswith("_"):
            _around(stack, module, name, f"kernel: {operation}.{name}")


def _around(stack: ExitStack, owner: Any, name: str, what: str) -> None:
    """Has calls of `owner.name` be ranges; the stack takes that back."""
    call: Callable[..., Any] = getattr(owner, name)
    had = name in vars(owner)

    @functools.wraps(call)
    def ranged(*arguments: Any, **options: Any) -> Any:
        with record_function(what):
            return call(*arguments, **options)

    setattr(owner, name, ranged)
    stack.callback(setattr, owner, name, call) if had else stack.callback(delattr, owner, name)
