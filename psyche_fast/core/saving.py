"""A run's checkpoints as rank 0 writes them: the model at once, the state behind it."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from psyche_fast.config import RunConfig
from psyche_fast.core.plan import Plan
from psyche_fast.core.resume import machine_of
from psyche_fast.rank import state
from psyche_fast.rank.checkpoint import sync
from psyche_fast.rank.protocol import collect_saved
from psyche_fast.rank.saving import StateWriter, state_folder
from psyche_fast.rank.state import Manifest
from psyche_fast.rank.trainer import Trainer

log = logging.getLogger("psyche_fast.core")


class States:
    """Rank 0's own part of each state, and the completion of all ranks' parts, in threads.

    Args:
        plan: the run.
        output: its directory.
        store: what the ranks say.
        tell: takes lines for the user, from any thread.
    """

    def __init__(
        self, plan: Plan, output: Path, store: dist.TCPStore, tell: Callable[[str], None]
    ) -> None:
        self._plan, self._output, self._tell = plan, output, tell
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # not in the stub
        self._writer = StateWriter(store.clone(), output)  # type: ignore[attr-defined]
        self._thread: threading.Thread | None = None
        self.whole: set[Path] = set()
        """The newest checkpoint that a run can go on from, if any."""

    def begin(self, trainer: Trainer, step: int) -> None:
        """Begins to write this rank's part; waits until the state before is complete."""
        self.wait()
        self._writer.write(trainer, step)

    def complete(self, step: int, folder: Path | None, then: Callable[[], None]) -> None:
        """Puts the state into its checkpoint when all ranks have written.

        Args:
            step: the step.
            folder: the checkpoint; None where there is none, and the state goes.
            then: called in any case, in a thread.
        """
        self._thread = threading.Thread(
            target=self._complete, args=(step, folder, then), daemon=True, name="states"
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written or completed."""
        self._writer.wait()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _complete(self, step: int, folder: Path | None, then: Callable[[], None]) -> None:
        written = state_folder(self._output, step)
        plan = self._plan
        try:
            _complete_state(folder, written, self._store, plan.resolved, step, plan.data)
            if folder is not None:
                self.whole = {folder.resolve()}
        except OSError as error:
            shutil.rmtree(written, ignore_errors=True)
            self._tell(f"--resume will not know the checkpoint of step {step}: {error}")
            log.warning("state of step %d not complete: %s", step, error)
        then()


def _complete_state(
    folder: Path | None,
    written: Path,
    store: dist.Store,
    config: RunConfig,
    step: int,
    data: dict[str, Any],
) -> None:
    """Waits for what all ranks write, and moves it, with a manifest, into a checkpoint's folder.

    Args:
        folder: the checkpoint's, which is the model by now; None where there is none, and what
            was written goes.
        written: where the ranks have written.
        store: tells what.
        config: the run's, resolved.
        step: the step.
        data: what `resume.identity` said.

    Raises:
        OSError: a rank could not write, or not here.
    """
    timeout = timedelta(seconds=config.machines.timeout)
    files = []
    saved = collect_saved(store, step, config.parallelism.world_size, timeout)
    if folder is None:
        shutil.rmtree(written, ignore_errors=True)
        return
    for rank, own in enumerate(saved):
        if own.error is not None:
            raise OSError(f"rank {rank}: {own.error}")
        for part in own.files:
            path = written / part.name
            if not path.is_file() or path.stat().st_size != part.size:
                raise OSError(
                    f"rank {rank} wrote its part on its own machine; --output has to be a folder "
                    "that all machines share"
                )
            files.append(part)
    manifest = Manifest(
        version=state.VERSION, step=step, config=config.to_dict(), data=data,
        machine=machine_of(config), files=files,
    )  # fmt: skip
    state.write_manifest(written, manifest)
    written.rename(folder / state.FOLDER)
    sync(folder)
    for leftover in written.parent.glob(".state-*"):  # of saves that were killed
        shutil.rmtree(leftover, ignore_errors=True)
