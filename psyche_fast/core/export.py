"""Hugging Face folders made of checkpoints' states: in a run's background, and by `export`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from psyche_fast.config import FLAGS, RunConfig
from psyche_fast.config import Model as ModelOptions
from psyche_fast.models.building import tied_names
from psyche_fast.models.loading import check_fit, without_weights
from psyche_fast.models.source import FilesSource, resolve_model
from psyche_fast.rank import state
from psyche_fast.rank.checkpoint import atomic_folder, under_all_names, write_tensors
from psyche_fast.rank.state import Piece, StateFile


class Exporter:
    """Writes a model from the parts of it that ranks have written, whatever ranks these were.

    No rank takes part, and no number of the model that trains is looked at.

    Args:
        source: the model's files: their form is what is written, some go along.
        options: the run's.
        all_names: whether tied weights are written under each of their names.

    Raises:
        ValueError: the model cannot be built.
    """

    def __init__(self, source: FilesSource, options: ModelOptions, *, all_names: bool) -> None:
        self._source, self._architecture = source, options.python_arch
        self._model = without_weights(source, options)
        self._aliases = tied_names(self._model.module) if all_names else {}

    @torch.no_grad()
    def write(
        self, folder: Path, written: Path, files: Sequence[StateFile], *, are_new: bool = False
    ) -> None:
        """Writes a Hugging Face folder.

        Args:
            folder: where to; there is nothing in it.
            written: the state's folder.
            files: its files.
            are_new: whether they have just been written: their content is not checked then.

        Raises:
            OSError: the disk is full or the folder cannot be written.
            ValueError: a file is damaged, or the state is another model's.
        """
        names = [f.name for f in files if f.name.startswith("parameters-")]
        reader = state.Reader(written, files, state.parameters_file(0), names, are_new=are_new)
        if not reader:
            raise ValueError(f"{written} has no {state.parameters_file(0)}")

        def read(name: str, like: Tensor) -> Tensor:
            return reader.read(name, Piece(like))

        tensors = self._model.full_state_dict_iter(read)
        write_tensors(folder, under_all_names(tensors, self._aliases))
        self._model.save_config(folder)
        for file in self._source.side_files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
        check_fit(resolve_model(str(folder)), self._architecture)


def export(checkpoint: Path, out: Path, save_dtype: str | None) -> int:
    """Makes a Hugging Face folder of a checkpoint, in one process.

    Args:
        checkpoint: its folder.
        out: a new folder, or an empty one.
        save_dtype: the parameters' type; None for the run's own. The masters are what is written
            as float32.

    Returns:
        the checkpoint's step.

    Raises:
        ValueError: it is damaged, or no checkpoint with a state; the file is named. Or there is
            something in `out`.
        OSError: the folder cannot be written.
    """
    manifest = state.read_manifest(checkpoint)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already; name a new folder or an empty one")
    state.check_sums(checkpoint, manifest)
    known = {name: value for name, value in manifest.config.items() if name in FLAGS}
    config = RunConfig.of(**known)
    if save_dtype is not None:
        config = config.replace(save_dtype=save_dtype)
    try:
        source = resolve_model(str(checkpoint))
        exporter = Exporter(source, config.model, all_names=config.run.run_id is not None)
        with atomic_folder(out.absolute(), replaces=False) as folder:
            exporter.write(folder, checkpoint / state.FOLDER, manifest.files, are_new=True)
    except ValueError as error:
        raise ValueError(str(error).replace("--model: ", f"{checkpoint}: ", 1)) from error
    return manifest.step
