"""A run, as rank 0 leads it: `steps` is the loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from psyche_fast.batch import Batch
from psyche_fast.config import RunConfig
from psyche_fast.core import card
from psyche_fast.core.elastic import Members
from psyche_fast.core.evaluation import Evaluation
from psyche_fast.core.feed import Feed
from psyche_fast.core.hub import HubUploads
from psyche_fast.core.lines import Lines
from psyche_fast.core.plan import Plan, left_over
from psyche_fast.core.ranks import Ranks, started
from psyche_fast.core.remote import RemoteUploads
from psyche_fast.core.saving import Checkpoints, keep_newest
from psyche_fast.core.status import Status
from psyche_fast.core.uploads import Uploads, waited_for
from psyche_fast.core.watch import Watch, watching
from psyche_fast.data import BatchPrefetcher
from psyche_fast.errors import explain
from psyche_fast.metrics import (
    Console,
    MetricsWriter,
    PhaseTimer,
    PsycheNames,
    flatten,
    make_tracker,
    memory_bytes,
    plot_run,
)
from psyche_fast.metrics.console import WarnOnce
from psyche_fast.metrics.formatting import format_count
from psyche_fast.metrics.trackers import Names, make_endpoint
from psyche_fast.metrics.writer import read_metrics
from psyche_fast.models.source import vocabulary_size
from psyche_fast.rank.checkpoint import atomic_folder
from psyche_fast.rank.counts import Totals
from psyche_fast.rank.elastic import join_own, welcome
from psyche_fast.rank.link import Settled
from psyche_fast.rank.members import Joiner
from psyche_fast.rank.memory import snapshot_if_full
from psyche_fast.rank.protocol import Exit, Join, Save, Sender, hand_on
from psyche_fast.rank.saving import restore
from psyche_fast.rank.serve import build_trainer
from psyche_fast.rank.simulated import Simulated
from psyche_fast.rank.state import FOLDER
from psyche_fast.rank.topology import join
from psyche_fast.rank.trainer import Trainer
from psyche_fast.start.cluster import Launched
from psyche_fast.start.devices import check_processors, processor
from psyche_fast.start.early import Early
from psyche_fast.start.elastic import ReplicaSidecars
from psyche_fast.start.libraries import keep_freed_memory
from psyche_fast.start.logs import link, rank_log
from psyche_fast.start.signals import StopRequest, also_at_exit_now
from psyche_fast.start.store import barrier, processors

if TYPE_CHECKING:
    from psyche_fast.core.profile import Profile

log = logging.getLogger("psyche_fast.core")


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        output: the run directory.
        checkpoint: the last checkpoint.
        last_step: the last step that was trained.
        signal: what stopped it early, if anything.
        is_complete: whether it was the run's last step.
    """

    output: Path
    checkpoint: Path | None
    last_step: int
    signal: int | None
    is_complete: bool = True


@dataclass(frozen=True)
class Core:
    """What the loop works with.

    Attributes:
        plan: the run.
        output: the run directory.
        trainer: rank 0's own.
        sender: takes what the other ranks are told.
        checkpoints: writes them.
        stop: whether the user wants the run to end.
        console: for what the user should know.
        timer: phases of a step are charged to it.
        watch: is told where the run is.
        evaluation: evaluates and samples.
        members: of an elastic run.
        full_speed: tokens per second that all devices could train; None where it is not known.
        ends: `time.perf_counter` at which it has to end.
    """

    plan: Plan
    output: Path
    trainer: Trainer
    sender: Sender
    checkpoints: Checkpoints
    stop: StopRequest
    console: Console
    timer: PhaseTimer
    watch: Watch
    evaluation: Evaluation
    members: Members | None = None
    full_speed: float | None = None
    ends: float = math.inf


def run(
    plan: Plan,
    launch: Launched | None = None,
    early: Early | None = None,
    profile: Profile | None = None,
) -> RunResult:
    """Runs a plan to its end.

    Args:
        plan: the run.
        launch: where the other ranks were started with this one (torchrun, Slurm).
        early: sidecars that have been started already, as far as they are needed.
        profile: looks on at rank 0's steps.

    Raises:
        SidecarFailed: a sidecar ended; the message names it.
        RuntimeError: replicas that differ, a lost machine, no memory.
        OSError: the run directory or the last checkpoint cannot be written.
    """
    config, began = plan.config, time.perf_counter()
    output = Path(config.run.output or datetime.now().strftime("runs/%Y%m%d-%H%M%S"))
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(_of_the_whole_run(config).to_toml())
    link(output / "logs" / "latest", "rank-0.log")
    with rank_log(output / "logs" / "rank-0.log", rank=0, level=config.tracking.log_level):
        # Within: standard error is then apart from what libraries write to its descriptor.
        console = Console(
            config.schedule.total_steps, config.schedule.start_step, every=config.tracking.log_every
        )
        with console, warnings_told(console.message, output / "logs"), ExitStack() as stack:
            uploads: list[Uploads] = []
            if config.run.push_to_hub is not None:
                uploads.append(HubUploads(config.run.push_to_hub, console.message))
            if config.run.checkpoint_to is not None:
                uploads.append(RemoteUploads(config.run.checkpoint_to, console.message))
            for one in uploads:
                stack.enter_context(waited_for(one))
            status = Status(output / "status.json")
            stack.enter_context(also_at_exit_now(lambda: status.end("failed: ended at once")))
            ends = math.inf if config.run.max_time is None else began + config.run.max_time
            try:
                with (
                    started(plan, output, launch, console, early) as ranks,
                    snapshot_if_full(output / "logs", 0),
                ):
                    result = _train(plan, output, ranks, console, uploads, status, ends, profile)
            except BaseException as error:
                status.end(f"failed: {explain(error)}")
                raise
            status.end(_how(result))
        last = result.checkpoint
        if uploads and last is not None:  # which the uploads have let go of
            keep_newest(plan, last, result.last_step, (), console.message, {last.resolve()})
        try:
            plot_run(output)
        except OSError as error:  # the run is complete without them
            console.message(f"plots not written: {error}")
    return result


@contextmanager
def warnings_told(tell: Callable[[str], None], logs: Path) -> Iterator[None]:
    """Within, the user hears of rank 0's warnings, one of each kind; all are in its log."""
    handler, ours = WarnOnce(tell, str(logs / "rank-0.log")), logging.getLogger("psyche_fast")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def _how(result: RunResult) -> str:
    """How a run ended, for its page."""
    if result.signal is not None:
        return f"stopped by {signal.Signals(result.signal).name} after step {result.last_step}"
    if not result.is_complete:
        return f"ended by --max-time after step {result.last_step}"
    return f"finished with step {result.last_step}"


def _of_the_whole_run(config: RunConfig) -> RunConfig:
    """The configuration without where this part of the run begins."""
    if config.run.resume is None and config.run.fork is None:
        return config
    return config.replace(resume=None, fork=None, start_step=1)


def _train(
    plan: Plan,
    output: Path,
    ranks: Ranks,
    console: Console,
    uploads: Sequence[Uploads],
    status: Status,
    ends: float,
    profile: Profile | None,
) -> RunResult:
    """Loads the model on all ranks, goes through the steps and ends the ranks."""
    config, device = plan.resolved, plan.devices.devices[0]
    run, stop = config.run, ranks.stop
    sender = Sender(ranks.store, config.parallelism.replicas)
    sender.publish_run(config.replace(output=str(output)), plan.source, Path.home())
    timeout = timedelta(seconds=config.machines.timeout)
    parallelism = config.parallelism
    costs = card.costs_at_start(config, plan.source, device)  # while the other ranks start
    console.card(card.card(config, plan.source, costs, device))
    # Before the ranks meet, which those of different backends never would.
    check_processors([processor(device), *processors(ranks.store, parallelism.world_size, timeout)])
    members, backend = None, plan.devices.backend
    if isinstance(ranks.sidecars, ReplicaSidecars):
        members = Members(config, ranks.store, ranks.sidecars, device, console.message)
        join_own(ranks.store, backend, members.epochs.place, device, timeout)
    else:
        join(backend, ranks.store, parallelism.world_size, 0, device, timeout)
    before = memory_bytes()["process"]
    if device.type == "cpu":
        keep_freed_memory(os.environ)
    trainer = build_trainer(config, plan.source, device, members.epochs if members else None)
    if trainer.settled is not None:
        plan = _settled(plan, trainer.settled, output, console)
        config = plan.resolved
    restore(trainer, config)
    if isinstance(trainer, Simulated) and run.resume is not None:
        trainer.begin_at(_virtual_seconds(output, config.schedule.start_step))
    if members is not None:
        members.begin(trainer)
    checkpoints = Checkpoints(
        plan, output, trainer, sender, ranks.store, console.message, uploads, members
    )
    timer = PhaseTimer() if profile is None else profile.timer
    watch = watching(ranks, config, timer, output / "logs", members, status)
    full_speed = None
    if costs.token_flops is not None:
        peak, whose = card.peak_flops(device, getattr(torch, config.model.param_dtype))
        full_speed = peak * parallelism.world_size / costs.token_flops
        console.card(
            [f"speed    {format_count(costs.token_flops)} operations a token; MFU is {whose}"]
        )
    vocabulary = vocabulary_size(trainer.model.config)
    evaluation = Evaluation(plan.held, config, trainer, timer, output, vocabulary)
    core = Core(
        plan, output, trainer, sender, checkpoints, stop, console, timer, watch, evaluation,
        members, full_speed, ends,
    )  # fmt: skip
    log.info("training begins")
    last_step, checkpoint = 0, None
    stop.has_work = True
    first, total = config.schedule.start_step, config.schedule.total_steps
    names: Names = flatten
    if run.metric_names == "psyche":
        names = PsycheNames(parallelism.copies, vocabulary)
    with (
        MetricsWriter(
            output / "metrics.jsonl", drop_from_step=first, tell=console.message
        ) as writer,
        BatchPrefetcher(plan.dataset, config.batch_sizes, first, total) as batches,
        make_tracker(
            run.tracker,
            output,
            plan.config.to_dict(),
            names,
            id=plan.trackers.get(run.tracker),
            first_step=first,
            options=config.tracking,
        ) as tracker,
        make_endpoint(config.tracking.metrics_port, config.machines.host, output) as endpoint,
        also_at_exit_now(tracker.finish),
        evaluation,
        watch,
        nullcontext() if profile is None else profile.over(trainer),
    ):
        checkpoints.trackers = plan.trackers | ({run.tracker: tracker.id} if tracker.id else {})

        def report(line: dict[str, Any]) -> None:
            writer.write(line)
            tracker.log(line["step"], line)
            endpoint.log(line["step"], line)
            console.step(line)
            if line["step"] == first + 2:
                console.card(card.held(costs.need, before, line["memory"]))

        try:
            for last_step, checkpoint in steps(core, batches, report):  # noqa: B007 - used below
                if profile is not None:
                    profile.step()
        except BaseException:
            checkpoints.leave()
            raise
    if isinstance(trainer, Simulated) and (said := trainer.summary()) is not None:
        console.message(said)
    unsaved = _save(run.save_path, checkpoint)
    stopped = stop.signal if last_step < total else None
    stop.has_work = False
    ranks.sidecars.expect_exit()
    sender.publish(Exit())
    hand_on(Exit(), trainer.topology)
    if members is not None:
        members.epochs.close()
        members.end()
    else:
        barrier(device, trainer.topology.everyone)
    dist.destroy_process_group()
    if unsaved is not None:
        raise unsaved
    return RunResult(output, checkpoint, last_step, stopped, last_step == total)


def _settled(plan: Plan, settled: Settled, output: Path, console: Console) -> Plan:
    """The run with what has been chosen for its link, which its directory then has too."""
    for line in settled.lines:
        console.message(line)
    plan = dataclasses.replace(
        plan,
        config=plan.config.replace(**settled.changes),
        resolved=plan.resolved.replace(**settled.changes),
    )
    (output / "config.toml").write_text(_of_the_whole_run(plan.config).to_toml())
    for line in left_over(plan.config):
        console.message(line)
    return plan


def _virtual_seconds(output: Path, first: int) -> float:
    """What a virtual clock showed before a step, by the lines of the run so far."""
    lines = read_metrics(output / "metrics.jsonl") if (output / "metrics.jsonl").exists() else []
    before = [
        line.get("virtual_seconds") or 0.0 for line in lines if line.get("step", first) < first
    ]
    return float(before[-1]) if before else 0.0


def _save(save_path: str | None, checkpoint: Path | None) -> OSError | None:
    """Copies the last checkpoint to `--save-path`; what went wrong is for later, ranks wait."""
    if save_path is None or checkpoint is None:
        return None
    path = Path(save_path).resolve()
    try:
        with atomic_folder(path, replaces=False) as folder:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=lambda *_: {FOLDER})
    except OSError as error:
        return OSError(f"--save-path {path}: {error}; the model is in {checkpoint}")
    return None


def steps(
    core: Core,
    batches: Iterator[tuple[int, Batch]],
    report: Callable[[dict[str, Any]], None],
) -> Iterator[tuple[int, Path | None]]:
    """Goes through the steps on all ranks.

    Nothing that the ranks say to each other is waited for in the step that it belongs to: a step is
    sent before the step before it is trained, and its line is written after the step that follows
    it. Over a slow link that costs no time as long as a step takes longer than a few round trips.

    Args:
        core: what to work with.
        batches: gives the steps' batches in turn.
        report: takes the steps' lines of `metrics.jsonl` in turn.

    Yields:
        each step when it is done, and the last one's checkpoint.

    Raises:
        ValueError: a batch cannot be read or has a token that the model does not know.
        OSError: a batch cannot be read, or the last checkpoint not be written.
        ReplicasDiffer: the replicas' parameters are no longer the same.
    """
    config, trainer, sender, timer = core.plan.resolved, core.trainer, core.sender, core.timer
    schedule, replicas = config.schedule, config.parallelism.copies
    vocabulary = vocabulary_size(trainer.model.config)
    feed, lines = Feed(batches, sender, vocabulary, timer), Lines(report, timer)
    members, saves = core.members, False
    num_tokens = config.batch_sizes.before(schedule.start_step) * config.model.sequence_length
    dense = sum(p.numel() * p.element_size() for p in trainer.parameters.values())
    before, longest = -1, 0.0
    feed.send(schedule.start_step)
    for step in range(schedule.start_step, schedule.total_steps + 1):
        began = time.perf_counter()
        core.watch.begins(step)
        # As the step after this would be, with what is evaluated after the last.
        late = began + 2 * longest + core.evaluation.longest >= core.ends
        stopped = core.stop.signal is not None  # what is evaluated then is only what is due
        last = step == schedule.total_steps or stopped or late
        try:
            sent = feed.take()
        except (ValueError, OSError):
            lines.write()
            with timer.phase("checkpoint"):
                core.checkpoints.hurry()
            raise
        saved, saves = saves, last or core.checkpoints.is_due(step)
        joiner = None
        if members is not None:
            sender.others = [replica for replica in members.replicas if replica]
            # Not in a step that is saved, whose state is copied in the next one; where all are,
            # every other.
            wants = None if last or (saves and not saved) else members.joiner()
            if wants is not None:
                saves = False
                joiner = Joiner(*wants, sender.publish(Join(step)) + 1)
                sender.others = [*sender.others, joiner.replica]
        if saves:  # in the order in which the ranks carry it out
            sender.publish(Save(step, at_once=last))
        if not last:
            feed.send(step + 1)
        hand_on(sent.mine, trainer.topology)
        with timer.phase("train"):
            output = trainer.train(step, sent.mine.batch())
            totals = Totals(output, trainer)
        with timer.phase("optimize"):
            trainer.optimize(step)
        lines.write()
        sender.forget(before)  # every rank's counts of that step have come
        before = sent.number
        num_tokens += sent.tokens
        seconds = time.perf_counter() - began
        longest = max(longest, seconds)
        fields: dict[str, Any] = {
            "step": step,
            "time": time.time(),
            "grad_norm": output.grad_norm,
            "learning_rate": trainer.learning_rate(step),
            "num_tokens": num_tokens,
            "tokens_per_second": sent.tokens / seconds,
            "step_seconds": seconds,
            "dense_bytes": dense if replicas > 1 else 0,
            "batch_bytes": sent.bytes,
            "memory": memory_bytes(trainer.model.device),
            **({"mfu": sent.tokens / seconds / core.full_speed} if core.full_speed else {}),
            **({"optim_stats": trainer.stats} if trainer.stats else {}),
            **trainer.refusals,
            **trainer.virtual,
        }
        if trainer.settled is not None and step == schedule.start_step:
            fields["link"] = trainer.settled.measured
        if members is not None:
            fields["rows"] = sent.rows
        lines.hold(totals, fields)
        checkpoint = None
        if last:
            try:
                with timer.phase("checkpoint"):
                    checkpoint = core.checkpoints.write(step)
            except OSError:  # the step itself is done
                lines.write(checkpoint=True)
                raise
        elif saves:
            core.checkpoints.begin(step)
        ends = step == schedule.total_steps or (late and not stopped)
        if seen := core.evaluation.after(step, last=ends):
            lines.add(seen)
        if last:
            lines.write(checkpoint=True)
        if members is not None and joiner is not None:
            hand_on(Join(step), trainer.topology)
            with timer.phase("join"):
                welcome(trainer, joiner)
            members.joined(joiner)
        yield step, checkpoint
        if last:
            return
