"""The step loop of rank 0."""

from __future__ import annotations

import logging
import platform
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from psyche_fast.config import RunConfig, optimizer_to_json
from psyche_fast.core.loop import StepLoop
from psyche_fast.core.plan import Plan
from psyche_fast.data import BatchPrefetcher
from psyche_fast.distro.replicas import ReplicasDiffer
from psyche_fast.errors import SidecarFailed, explain
from psyche_fast.metrics import (
    Console,
    MetricsWriter,
    PhaseTimer,
    make_tracker,
    plot_run,
)
from psyche_fast.psyche import messages
from psyche_fast.psyche.store import CoreStore, barrier
from psyche_fast.rank import serve as runtime
from psyche_fast.rank.checkpoint import atomic_folder
from psyche_fast.sidecar import TIMEOUT
from psyche_fast.start.cluster import Launched, announce
from psyche_fast.start.ending import also_at_exit_now
from psyche_fast.start.logs import rank_log
from psyche_fast.start.network import listen, tcp_url, use_interface
from psyche_fast.start.signals import StopRequest, stop_on_signal
from psyche_fast.start.spawn import Sidecars, local_ranks

log = logging.getLogger("psyche_fast.core")

_DEATH_SECONDS = 2.5
"""How long a failing core looks for the sidecar whose death is the cause."""
_EXIT_SECONDS = 30.0


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        output: the run directory.
        checkpoint: the last checkpoint.
        last_step: the last step that was trained.
        signal: what stopped it early, if anything.
    """

    output: Path
    checkpoint: Path | None
    last_step: int
    signal: int | None


def run(plan: Plan, place: Launched | None = None) -> RunResult:
    """Runs a plan to its end.

    Args:
        plan: the run.
        place: where the other ranks were started with this one (torchrun, Slurm).

    Raises:
        SidecarFailed: a sidecar ended; the message names it.
        RuntimeError: replicas that differ, a lost machine, no memory.
        OSError: the run directory or the last checkpoint cannot be written.
    """
    config = plan.config
    name = datetime.now().strftime("runs/%Y%m%d-%H%M%S")
    output = Path(config.output or name)
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "config.toml").write_text(config.to_toml())
    with rank_log(output / "logs" / "rank-0.log", rank=0):
        return _Core(plan, output, place).run()


class _Core:
    def __init__(self, plan: Plan, output: Path, place: Launched | None) -> None:
        self.plan = plan
        self.place = place
        self.config: RunConfig = plan.config
        self.output = output
        self.device = plan.devices.devices[0]
        self.timeout = timedelta(seconds=self.config.timeout)
        self.console = Console(self.config.total_steps, self.config.start_step)
        self.timer = PhaseTimer()

    def run(self) -> RunResult:
        config, plan = self.config, self.plan
        sock = listen(config.host, config.port)
        host, port = sock.getsockname()[:2]
        use_interface(host)
        environment = {TIMEOUT: str(config.timeout)}
        if plan.settings.threads:
            environment["OMP_NUM_THREADS"] = str(plan.settings.threads)
        address = tcp_url(host, port)
        with ExitStack() as stack:
            stack.callback(sock.close)  # until the store takes it over
            stack.enter_context(self.console)
            sidecars = stack.enter_context(
                Sidecars(plan.devices.backend, address, config.world_size, environment)
            )
            stop = stack.enter_context(stop_on_signal(self.console.message, sidecars.kill))
            for rank in local_ranks(config.world_size, config.ranks_here):
                device = plan.devices.devices[rank]
                log_file = self.output / "logs" / f"rank-{rank}.log"
                sidecars.spawn(rank, device.index, log_file)
            sidecars.watch(grace=_DEATH_SECONDS + 1)
            missing = config.world_size - config.ranks_here
            if self.place is not None:
                announce(self.place, host, port)
            elif missing:
                self.console.message(
                    f"waiting for {missing} ranks from other machines: psyche-fast sidecar "
                    f"--main-host {_reachable(host)} --port {port} "
                    f"--world-size {config.world_size} --start-rank {config.ranks_here} "
                    f"--num-local-ranks {missing} "
                    f"--backend {plan.devices.backend}"
                )
            store = CoreStore(sock, config.world_size, self.timeout)
            try:
                result = self._train(store, stop, sidecars)
                sidecars.join(_EXIT_SECONDS)
            except (SidecarFailed, ReplicasDiffer):
                raise
            except Exception as error:
                message = sidecars.failure(_DEATH_SECONDS if _lost_a_rank(error) else 0.2)
                if message is None:
                    if isinstance(error, ValueError | OSError):
                        raise
                    message = explain(error)
                raise SidecarFailed(message) from error
        try:
            plot_run(self.output)
        except OSError as error:  # the run is complete without them
            self.console.message(f"plots not written: {error}")
        return result

    def _train(self, store: CoreStore, stop: StopRequest, sidecars: Sidecars) -> RunResult:
        config, plan, device = self.config, self.plan, self.device
        store.publish_model(
            config.python_arch,
            plan.source,
            config.data_parallelism,
            config.tensor_parallelism,
            plan.settings,
            str(Path.home()),
        )
        runtime.join(plan.devices.backend, store.store, config.world_size, 0, device, self.timeout)
        torch.manual_seed(1337)  # as the sidecars do
        model, topology = runtime.load(
            config.python_arch,
            plan.source,
            config.data_parallelism,
            config.tensor_parallelism,
            plan.settings,
            device,
        )
        operation = messages.Hyperparameters(
            lr_scheduler=config.lr_scheduler(),
            optimizer=optimizer_to_json(config.optimizer()),
            micro_batch_size=config.micro_batch * config.data_parallelism,
            grad_accum_in_fp32=config.grad_accum_in_fp32,
        )
        store.publish(operation)
        trainer = runtime.build_trainer(model, topology, operation, plan.settings)
        log.info("training begins")
        checkpoint = None
        stop.has_work = True
        with (
            MetricsWriter(
                self.output / "metrics.jsonl", drop_from_step=config.start_step
            ) as writer,
            BatchPrefetcher(
                plan.dataset, config.total_batch, config.start_step, config.total_steps
            ) as batches,
            make_tracker(config.tracker, self.output, config.to_dict()) as tracker,
            also_at_exit_now(tracker.finish),
        ):

            def report(line: dict[str, Any]) -> None:
                writer.write(line)
                tracker.log(line["step"], line)
                self.console.step(line)

            loop = StepLoop(
                config, store, trainer, batches, report, device=device, timer=self.timer,
                side_files=plan.source.side_files,
            )  # fmt: skip
            step = config.start_step
            while True:
                last = step == config.total_steps or stop.signal is not None
                saves = last or self._saves(step)
                loop.step(step, saves=saves, last=last)
                if saves:
                    checkpoint = self._checkpoint(loop, step, must=last) or checkpoint
                    loop.finish()
                if last:
                    break
                step += 1
        if config.save_path is not None and checkpoint is not None:
            with atomic_folder(Path(config.save_path).resolve()) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        stopped = stop.signal if step < config.total_steps else None
        stop.has_work = False
        sidecars.expect_exit()
        store.publish(messages.Exit())
        barrier(device, topology.everyone)
        dist.destroy_process_group()
        return RunResult(self.output, checkpoint, step, stopped)

    def _saves(self, step: int) -> bool:
        every = self.config.checkpoint_every
        return every > 0 and step % every == 0

    def _checkpoint(self, loop: StepLoop, step: int, *, must: bool) -> Path | None:
        path = self.output / "checkpoints" / f"step-{step:06d}"
        try:
            with self.timer.phase("checkpoint"):
                loop.save(path)
        except OSError as error:
            if must:
                raise
            # A full disk is no reason to lose the run: older checkpoints are untouched.
            self.console.message(f"checkpoint of step {step} not written: {error}; going on")
            log.warning("checkpoint of step %d not written: %s", step, error)
            return None
        return path


def _reachable(host: str) -> str:
    """What other machines call this one."""
    return platform.node() if host in ("0.0.0.0", "::") else host


def _lost_a_rank(error: Exception) -> bool:
    return isinstance(error, dist.DistError | RuntimeError) and not isinstance(error, ValueError)
