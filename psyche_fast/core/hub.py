"""`--push-to-hub`: checkpoints on their way to the Hugging Face hub while training goes on."""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from psyche_fast.rank.state import FOLDER
from psyche_fast.start.signals import also_at_exit_now

log = logging.getLogger("psyche_fast.core")

_NOT_THERE = f"{FOLDER}/*"
"""What a run goes on from is larger than the model and for nobody else."""


def check_hub(repo: str) -> None:
    """Checks what can be known of an upload before a run begins.

    Raises:
        ValueError: no repository's name, or the hub's client has been told to stay offline.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub: {str(error).splitlines()[0]}") from error
    if "/" not in repo:
        raise ValueError(f"--push-to-hub: wanted OWNER/NAME, got {repo!r}")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set, nothing can be uploaded")


class HubUploads:
    """Uploads checkpoints' models in a thread, one at a time, each as a commit `step N`.

    Where an upload takes longer than the steps between two checkpoints, the newest one that waits
    is next, and those before it are left out. What fails is said and is no reason to end a run.

    Args:
        repo: the repository, made where there is none.
        tell: takes lines for the user, from any thread.
    """

    def __init__(self, repo: str, tell: Callable[[str], None]) -> None:
        self._repo, self._tell = repo, tell
        self._changed = threading.Condition()
        self._waiting: tuple[int, Path] | None = None
        self._current: tuple[int, Path] | None = None
        self._closed = False
        # A daemon: whoever ends the program at once need not wait for it.
        self._thread = threading.Thread(target=self._work, daemon=True, name="hub")
        self._thread.start()

    @property
    def busy(self) -> set[Path]:
        """Checkpoints that are being uploaded or wait to be."""
        with self._changed:
            return {pair[1] for pair in (self._current, self._waiting) if pair is not None}

    def push(self, step: int, path: Path) -> None:
        """Has a checkpoint uploaded."""
        with self._changed:
            left_out, self._waiting = self._waiting, (step, path)
            self._changed.notify_all()
        if left_out is not None:
            log.info("checkpoint of step %d not uploaded: a newer one is there", left_out[0])

    def finish(self) -> None:
        """Waits for what is under way; Ctrl-C leaves it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._say_of_the_newest("uploading to {}; Ctrl-C ends that, to finish it later: {}")
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.abandon()

    def abandon(self) -> None:
        """Says how to go on with what has not been uploaded, if anything."""
        self._say_of_the_newest("not uploaded to {}; to finish it: {}")

    def _say_of_the_newest(self, text: str) -> None:
        with self._changed:
            newest = self._waiting or self._current
        if newest is not None:
            self._tell(text.format(self._repo, self._command(newest[1])))

    def _command(self, path: Path) -> str:
        return shlex.join(
            ["hf", "upload", self._repo, str(path.resolve()), ".", "--exclude", f"{FOLDER}/*"]
        )

    def _work(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the terminal is the run's
        api = HfApi()
        # At once: whoever has no right to upload hears of it while he can still do something.
        self._try("cannot be created", lambda: api.create_repo(self._repo, exist_ok=True))
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                self._current, self._waiting = self._waiting, None
                step, path = self._current
            upload = partial(
                api.upload_folder,
                repo_id=self._repo,
                folder_path=path,
                ignore_patterns=[_NOT_THERE],
                commit_message=f"step {step}",
            )
            if self._try(f"checkpoint of step {step} not uploaded", upload, path):
                self._tell(f"checkpoint of step {step} uploaded to {self._repo}")
            with self._changed:
                self._current = None

    def _try(self, what: str, action: Callable[[], object], path: Path | None = None) -> bool:
        try:
            action()
        # The client's errors share no base class: HTTP, cache and disk each have theirs.
        except Exception as error:
            said = str(error).strip()
            reason = said.splitlines()[0] if said else repr(error)
            with self._changed:
                newer = self._waiting is not None
            if path is not None:
                reason += "; a newer one is next" if newer else f"; by hand: {self._command(path)}"
            self._tell(f"--push-to-hub {self._repo}: {what}: {reason}")
            log.warning("%s: %s", self._repo, what, exc_info=True)
            return False
        return True


@contextmanager
def uploads(repo: str | None, tell: Callable[[str], None]) -> Iterator[HubUploads | None]:
    """Uploads to a repository while the block runs, and is then waited for.

    After an error, or when the program is ended at once, it says what is left to do.

    Args:
        repo: the repository; None for no uploads.
        tell: see `HubUploads`.
    """
    if repo is None:
        yield None
        return
    hub = HubUploads(repo, tell)
    with also_at_exit_now(hub.abandon):
        try:
            yield hub
        except BaseException:
            hub.abandon()
            raise
        hub.finish()
