"""A run's checkpoints as rank 0 writes them: the model at once, the state behind it."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from psyche_fast.core.plan import Plan
from psyche_fast.core.resume import complete_state
from psyche_fast.rank.saving import StateWriter, state_folder
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
            complete_state(folder, written, self._store, plan.resolved, step, plan.data)
            if folder is not None:
                self.whole = {folder.resolve()}
        except OSError as error:
            shutil.rmtree(written, ignore_errors=True)
            self._tell(f"--resume will not know the checkpoint of step {step}: {error}")
            log.warning("state of step %d not complete: %s", step, error)
        then()
