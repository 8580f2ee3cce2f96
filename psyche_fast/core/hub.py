"""`--push-to-hub`: checkpoints on their way to the Hugging Face hub while training goes on."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from psyche_fast.core.uploads import Uploads
from psyche_fast.rank.state import FOLDER

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


class HubUploads(Uploads):
    """Uploads checkpoints' models, each as a commit `step N`.

    Args:
        repo: the repository, made where there is none.
        tell: takes lines for the user, from any thread.
    """

    def __init__(self, repo: str, tell: Callable[[str], None]) -> None:
        self._repo = repo
        super().__init__("--push-to-hub", repo, tell)

    def prepare(self) -> None:
        """Creates the repository."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the terminal is the run's
        self._api = HfApi()
        self._api.create_repo(self._repo, exist_ok=True)

    def upload(self, step: int, path: Path) -> None:
        """Commits a model."""
        self._api.upload_folder(
            repo_id=self._repo,
            folder_path=path,
            ignore_patterns=[_NOT_THERE],
            commit_message=f"step {step}",
        )

    def by_hand(self, path: Path) -> str:
        """The hub's own command."""
        return shlex.join(
            ["hf", "upload", self._repo, str(path.resolve()), ".", "--exclude", _NOT_THERE]
        )
