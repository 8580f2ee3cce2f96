"""`--resume` and `--fork`: which checkpoint a run goes on from, and whether it is of this run."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from psyche_fast import __version__
from psyche_fast.config import FLAGS, RunConfig, flag
from psyche_fast.core.checkpoints import step_of
from psyche_fast.core.remote import fetched, is_url
from psyche_fast.data import Dataset
from psyche_fast.kernels.backends import explain
from psyche_fast.rank import state
from psyche_fast.rank.saving import SPLIT, fits, is_by_method
from psyche_fast.rank.state import Manifest
from psyche_fast.views import Evaluation, Tracking

_FREE = {
    *("output", "save_path", "checkpoint_every", "keep", "keep_every", "run_id"),
    *("push_to_hub", "checkpoint_to"),
    *("tracker", "metric_names", "resume", "fork", "start_step", "model", "data_path"),
    *("save_dtype", "device", "threads", "host", "secret_file", "port", "local_ranks", "timeout"),
    *("tls_key", "tls_cert", "tls_ca"),
    *("device_backend", "check_every", "optim_stats", "attn_implementation"),
    *("data_cache", "data_cache_gb", "cold_start_step"),
    *("elastic", "max_replicas", "max_time"),
    *Evaluation.__struct_fields__,
    *Tracking.__struct_fields__,
}
"""Flags that may be others: no bit of what is trained hangs on them, or a warning says that."""
_NEW_NUMBERS = (
    *("total_steps", "total_tokens", "replicas", "simulate"),
    *("data_parallelism", "tensor_parallelism"),
)
"""Flags that may be others, which changes the bits of what is trained from then on."""


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        folder: the checkpoint's.
        manifest: of its state.
        notes: what the user should know.
    """

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]


def find_start(config: RunConfig) -> Start | None:
    """The checkpoint that `--resume` or `--fork` names; None where the run begins.

    Raises:
        ValueError: there is none that is whole; the last one that is not is named.
    """
    name = config.run.resume or config.run.fork
    if name is None:
        return None
    which = flag("resume" if config.run.resume else "fork")
    output = config.run.output
    if name == "auto" or name.isdigit():
        if which == "--fork" or output is None:
            raise ValueError(f"{which} {name} needs --output, the run directory to go on in")
        if name == "auto" and not Path(output, "checkpoints").exists():
            return None
    if is_url(name) and output is None:
        raise ValueError(f"{which} {name} needs --output, where the checkpoint is downloaded to")
    root = Path(output or "") if name == "auto" or name.isdigit() else Path(name)
    step = int(name) if name.isdigit() else None
    notes: list[str] = []
    if is_url(name):
        # A fork's are no checkpoints of its own.
        place = Path(output or "", "checkpoints" if which == "--resume" else "downloads")
        candidates = fetched(name, place, which)
    else:
        candidates = _candidates(root, which)
    for folder in candidates:
        try:
            manifest = state.read_manifest(folder)
            if step is not None and manifest.step != step:
                continue
            state.check_sums(folder, manifest)
        except ValueError as error:
            said = str(error)
            if is_url(name):  # what has come is of no use
                shutil.rmtree(folder, ignore_errors=True)
                there = name.rstrip("/").removesuffix(f"/{folder.name}")
                said = said.replace(str(folder), f"{there}/{folder.name}")
            notes.append(f"{which}: passed over {said}")
            continue
        named = step is not None or folder == root or is_url(name)
        if which == "--resume" and named:  # not simply the newest
            _check_latest(folder.resolve(), manifest.step, output)
        return Start(folder.resolve(), manifest, tuple(notes))
    if name == "auto" and not notes:
        return None
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise ValueError(
        "; ".join([f"{which} {name}: {wanted} that can be gone on from in {root}", *notes])
    )


def _candidates(root: Path, which: str) -> Iterator[Path]:
    """Checkpoints in a run directory, the newest first, or the one that a folder is."""
    if (root / state.FOLDER).is_dir() or (root / "config.json").is_file():
        yield root
        return
    if not (root / "checkpoints").is_dir():
        raise ValueError(f"{which}: {root} is neither a checkpoint nor a run directory")
    steps = {p: step_of(p) for p in (root / "checkpoints").iterdir() if p.is_dir()}
    yield from sorted((p for p, n in steps.items() if n), key=lambda p: steps[p] or 0, reverse=True)


def _check_latest(folder: Path, step: int, output: str | None) -> None:
    """Checks that no later checkpoint of the run would be taken for one of what follows.

    Raises:
        ValueError: there is one.
    """
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or (output and Path(output).resolve() != run):
        return
    later = [p.name for p in folder.parent.glob("*") if (step_of(p) or 0) > step]
    if later:
        raise ValueError(
            f"--resume: {run} has checkpoints of later steps ({', '.join(sorted(later))}), which "
            "would be mixed with new ones; move them away, or give another --output"
        )


def check_start(
    start: Start, config: RunConfig, dataset: Dataset, device: torch.device
) -> tuple[str, ...]:
    """Checks that a run can go on where its checkpoint is.

    Args:
        start: the checkpoint.
        config: the run, resolved.
        dataset: opened.
        device: rank 0's.

    Returns:
        Lines for the user: where it goes on, and what changes the bits of what follows.

    Raises:
        ValueError: it is of another run, model, world or data set.
    """
    manifest, forks = start.manifest, config.run.fork is not None
    changed = {}
    for name, known in FLAGS.items():
        then, now = manifest.config.get(name, known.default), _value(config, name)
        if then != now and name not in _FREE:
            changed[name] = f"{flag(name)} {_said(then)} -> {_said(now)}"
    which = flag("fork" if forks else "resume")
    kept = SPLIT if is_by_method(config) else ()
    refused = [t for name, t in changed.items() if name not in _NEW_NUMBERS or name in kept]
    if refused and not forks:
        raise ValueError(
            f"--resume: {', '.join(refused)} since {start.folder}; give what it had, or begin a "
            "run of its own by --fork"
        )
    different = list(changed.values())
    if (data := identity(dataset)) != manifest.data:
        if not forks:
            raise ValueError(
                f"--resume: --data-path is not the data that {start.folder} was trained on "
                f"({manifest.data.get('sequences')} sequences then, {data['sequences']} now)"
            )
        different.append("other data")
    lines = [*start.notes, f"{which[2:]:8} {start.folder}, from step {manifest.step + 1}"]
    if different:
        lines.append(f"changed  {', '.join(different)}")
    if not fits(manifest, config):
        lines.append(
            "warning  the optimizer's state has another form: only parameters are taken up"
        )
    machine = machine_of(config, device)
    before = {name: manifest.machine.get(name, value) for name, value in machine.items()}
    other = [f"{k} {v} -> {machine[k]}" for k, v in before.items() if machine[k] != v]
    if other and not forks:
        lines.append(f"warning  {', '.join(other)}: the state is exact, what follows need not be")
    return tuple(lines)


def identity(dataset: Dataset) -> dict[str, Any]:
    """What tells a data set from another: its size, and a few of its sequences."""
    count = len(dataset)
    digest = hashlib.sha256()
    for number in sorted({0, count // 2, count - 1}):
        (sample,) = dataset.get_samples(number, number)
        digest.update(sample.input_ids.numpy().tobytes())
    return {"sequences": count, "sample": digest.hexdigest()}


def machine_of(config: RunConfig, device: torch.device) -> dict[str, str]:
    """On what the bits of a step hang beside the run's configuration.

    Args:
        config: resolved.
        device: rank 0's.
    """
    on_gpu = device.type == "cuda"
    return {
        "psyche_fast": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(device)
        if on_gpu
        else torch.backends.cpu.get_cpu_capability(),
        "threads": str(config.machines.threads),
        "attention": config.model.attn_implementation,
        "kernels": explain(device)[0],
        "backend": config.parallelism.device_backend if on_gpu else "gloo",
    }


def _value(config: RunConfig, name: str) -> Any:
    return getattr(getattr(config, FLAGS[name].section), name)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
