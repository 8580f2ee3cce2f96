"""A run's checkpoints as rank 0 writes them: state and model, in a thread beside training."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from psyche_fast.core.checkpoints import checkpoint_name, prune
from psyche_fast.core.elastic import Members
from psyche_fast.core.export import Exporter
from psyche_fast.core.plan import Plan
from psyche_fast.core.resume import machine_of
from psyche_fast.core.uploads import Uploads
from psyche_fast.models.building import tied_names
from psyche_fast.rank import state
from psyche_fast.rank.checkpoint import atomic_folder, save_model, under_all_names
from psyche_fast.rank.protocol import Gather, Save, Sender, collect_saved, hand_on
from psyche_fast.rank.saving import StateWriter, state_folder
from psyche_fast.rank.state import Manifest, StateFile
from psyche_fast.rank.trainer import Trainer

log = logging.getLogger("psyche_fast.core")

_TOLD = {"is_told": True}
"""Of a line in the log that the user hears in other words."""
Who = tuple[Sequence[int], Callable[[int], bool]]


class Checkpoints:
    """Rank 0's own part of each state, and what is made of all ranks' parts.

    Ranks write their parts of a state beside training; when all have, a thread makes the model's
    Hugging Face folder of them, and both appear under the checkpoint's name at once. There is never
    more than one on its way.

    Args:
        plan: the run.
        output: its directory.
        trainer: rank 0's own.
        sender: takes what the other ranks are told.
        store: what the ranks say.
        tell: takes lines for the user, from any thread.
        uploads: take checkpoints.
        members: of an elastic run.

    Attributes:
        trackers: what trackers call the run, by their names.
    """

    def __init__(
        self,
        plan: Plan,
        output: Path,
        trainer: Trainer,
        sender: Sender,
        store: dist.TCPStore,
        tell: Callable[[str], None],
        uploads: Sequence[Uploads] = (),
        members: Members | None = None,
    ) -> None:
        self._plan, self._output, self._trainer, self._sender = plan, output, trainer, sender
        self._tell, self._uploads, self._members = tell, uploads, members
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # not in the stub
        self._writer = StateWriter(store.clone(), output)  # type: ignore[attr-defined]
        model, self._all_names = plan.resolved.model, plan.config.run.run_id is not None
        self._exporter = Exporter(plan.source, model, all_names=self._all_names)
        self._thread: threading.Thread | None = None
        self._collected = threading.Event()
        self._error: Exception | None = None
        self._begun: int | None = None
        # The newest one that a run can go on from, if any.
        self._whole = {Path(resumed)} if (resumed := plan.config.run.resume) else set()
        self.trackers: dict[str, str] = {}
        for leftover in (output / "checkpoints").glob(".state-*"):  # of saves that were killed
            shutil.rmtree(leftover, ignore_errors=True)

    def is_due(self, step: int) -> bool:
        """Whether a step's checkpoint is to be written; said where it is left out.

        Raises:
            ValueError: what has been written is not the run's model.
        """
        self._raise()
        every = self._plan.config.run.checkpoint_every
        if not every or step % every:
            return False
        if self._thread is not None and self._thread.is_alive():
            self._tell(f"no checkpoint of step {step}: that of step {self._begun} is being written")
            return False
        return True

    def begin(self, step: int) -> None:
        """Begins a checkpoint: the state is copied during the next step, all ranks take part."""
        hand_on(Save(step), self._trainer.topology)
        self.wait()
        self._begun = step
        self._writer.save(self._trainer, step, at_once=False)
        self._thread = threading.Thread(
            target=self._work, args=(step, self._who()), daemon=True, name="checkpoint"
        )
        self._thread.start()

    def write(self, step: int) -> Path:
        """Writes a checkpoint before anything else happens; all ranks take part.

        Where its state cannot be written, the model alone is, gathered from its ranks.

        Raises:
            OSError: nor can the model.
            ReplicasDiffer: no replica is worth writing.
        """
        trainer, path = self._trainer, self._path(step)
        hand_on(Save(step, at_once=True), trainer.topology)
        self.wait()
        self._raise()
        self._writer.save(trainer, step, at_once=True)
        try:
            self._complete(step, self._who())
        except OSError as error:
            self._drop(step)
            self._tell(f"--resume will not know the checkpoint of step {step}: {error}")
            log.warning("state of step %d not complete: %s", step, error, extra=_TOLD)
            self._sender.publish(Gather())
            hand_on(Gather(), trainer.topology)
            tensors = trainer.model.full_state_dict_iter()
            if self._all_names:
                tensors = under_all_names(tensors, tied_names(trainer.model.module))
            save_model(path, trainer.model, tensors, self._plan.source.side_files)
        self._then(step)
        return path

    def hurry(self) -> None:
        """Writes a checkpoint that has been begun, where the next step does not come."""
        if self._begun is not None and self._trainer.drop_snapshot():
            save = Save(self._begun, at_once=True)
            self._sender.publish(save)
            hand_on(save, self._trainer.topology)
            self._writer.save(self._trainer, self._begun, at_once=True)
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is being written."""
        self._writer.wait()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def leave(self) -> None:
        """After an error: waits for a checkpoint of which all ranks' parts are there."""
        if self._thread is not None and self._collected.is_set():
            self._thread.join()

    def _who(self) -> Who:
        """The ranks that write, and whether one has left since."""
        if self._members is not None:
            return self._members.now()
        return range(self._plan.resolved.parallelism.world_size), lambda rank: False

    def _work(self, step: int, who: Who) -> None:
        try:
            self._complete(step, who)
        except OSError as error:
            # A full disk is no reason to lose the run: older checkpoints are untouched.
            self._drop(step)
            self._tell(f"checkpoint of step {step} not written: {error}; going on")
            log.warning("checkpoint of step %d not written: %s", step, error, extra=_TOLD)
        except Exception as error:  # the training thread raises it
            self._drop(step)
            self._error = error
        else:
            self._then(step)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _path(self, step: int) -> Path:
        return self._output / "checkpoints" / checkpoint_name(step, self._plan.config.run.run_id)

    def _drop(self, step: int) -> None:
        shutil.rmtree(state_folder(self._output, step), ignore_errors=True)

    def _complete(self, step: int, who: Who) -> None:
        """Waits for what all ranks write, and makes a checkpoint of it.

        It is the model alone, which is said, where the parameters are all here and other parts are
        not: ranks of further replicas may write on machines of their own.

        Raises:
            OSError: a rank could not write, or not here; or the model cannot be written.
            ValueError: it is not the run's model.
        """
        self._collected.clear()
        config, written = self._plan.resolved, state_folder(self._output, step)
        timeout = timedelta(seconds=config.machines.timeout)
        files: list[StateFile] = []
        saved = collect_saved(self._store, step, *who, timeout)
        self._collected.set()
        lacks: list[str] = []
        for rank, own in saved.items():
            if own.error is not None:
                lacks.append(f"rank {rank}: {own.error}")
            for part in own.files:
                path = written / part.name
                if path.is_file() and path.stat().st_size == part.size:
                    files.append(part)
                else:
                    lacks.append(
                        f"rank {rank} wrote its part on its own machine, or it is gone; --output "
                        "has to be a folder that all machines share"
                    )
        names = {part.name for part in files}
        ranks = config.parallelism.ranks_per_replica
        if lacks and not names.issuperset(map(state.parameters_file, range(ranks))):
            raise OSError(lacks[0])
        path = self._path(step)
        with atomic_folder(path) as folder:
            self._exporter.write(folder, written, files, are_new=True)
            if lacks:
                self._drop(step)
                self._tell(f"--resume will not know the checkpoint of step {step}: {lacks[0]}")
                log.warning(
                    "state of step %d not complete: %s", step, "; ".join(lacks), extra=_TOLD
                )
                return
            manifest = Manifest(
                version=state.VERSION, step=step, config=config.to_dict(), data=self._plan.data,
                machine=machine_of(config, self._plan.devices.devices[0]), tracker=self.trackers,
                files=files, model=[state.sealed(file) for file in sorted(folder.iterdir())],
            )  # fmt: skip
            state.write_manifest(written, manifest)
            written.rename(folder / state.FOLDER)
        self._whole = {path.resolve()}

    def _then(self, step: int) -> None:
        path = self._path(step)
        for one in self._uploads:
            one.push(step, path)
        keep_newest(self._plan, path, step, self._uploads, self._tell, self._whole)


def keep_newest(
    plan: Plan,
    newest: Path,
    step: int,
    uploads: Sequence[Uploads],
    tell: Callable[[str], None],
    whole: set[Path],
) -> None:
    """Carries out `--keep`; what is being uploaded stays, and `whole`, which has a state."""
    # Of the model that the run began with, files go into each checkpoint.
    spared = whole | {file.parent.resolve() for file in plan.source.files}
    spared |= {path.resolve() for one in uploads for path in one.busy}
    try:
        prune(newest, step, plan.config.run, spared)
    except OSError as error:
        tell(f"--keep: an older checkpoint is still there: {error}")
        log.warning("--keep: %s", error, extra=_TOLD)
