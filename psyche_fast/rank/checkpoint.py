"""Model checkpoints as Hugging Face folders, written whole or not at all.

`model.safetensors`, or numbered shards and their index, beside `config.json`, generation
config and tokenizer: what `AutoModelForCausalLM.from_pretrained` loads.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from psyche_fast.models import CausalLM
from psyche_fast.models.loading import check_fit
from psyche_fast.models.source import resolve_model

MAX_SHARD_BYTES = 5 * 10**9

# Of Linux's fcntl.h and fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_folder(path: Path, *, replaces: bool = True) -> Iterator[Path]:
    """A folder that appears at `path` complete and on disk, or not at all.

    Yields a temporary folder beside it. On success its files are synced and it takes the name; an
    older folder of that name is there until then, and on Linux's own file systems at every moment
    one of the two. On an error the temporary one is removed; after a kill the next save does it.

    Args:
        path: the folder.
        replaces: whether an older folder with files in it may go.

    Raises:
        OSError: the disk is full, or something is in the way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
            sync(file)
        sync(temporary)
        if not replaces:
            temporary.rename(path)  # over an empty folder alone
        elif not (path.exists() and _exchange(temporary, path)):
            if path.exists():
                path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    """Of saves that were killed, to this name or one that differs in its number: a run's steps."""
    alike = re.sub(r"\d+", r"\\d+", re.escape(path.name))
    for other in path.parent.iterdir():
        match = re.fullmatch(rf"\.({alike})\.(tmp|old)-(\d+)", other.name)
        if match is None or _runs(int(match[3])):
            continue
        # Without a folder that has replaced it, an old one is all that there is.
        if match[2] == "tmp" or path.with_name(match[1]).exists():
            shutil.rmtree(other, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where the system or the file system cannot.

    Raises:
        OSError: it can, but failed.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:  # Linux's alone, and not in every C library
        return False
    if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync(path: Path) -> None:
    """Brings a file or the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor | None]], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes safetensors in shards of at most `max_bytes` (one tensor at least), holding one.

    Args:
        folder: where to.
        tensors: names and full CPU tensors, one at a time.
        max_bytes: bytes per shard.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    shards: list[list[str]] = []
    part: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal part, held
        try:
            save_file(part, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk among others, and no OSError
            raise OSError(f"{folder}: {error}") from error
        shards.append(list(part))
        part, held = {}, 0

    for name, tensor in tensors:
        assert tensor is not None, "the first rank of a replica gets the tensors"
        if part and held + tensor.nbytes > max_bytes:
            flush()
        part[name] = tensor.contiguous()
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for at, names in enumerate(shards):
        # The number of shards stands in each name, so it is known only now.
        file = f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{at}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def under_all_names(
    tensors: Iterable[tuple[str, Tensor | None]], aliases: Mapping[str, str]
) -> Iterator[tuple[str, Tensor | None]]:
    """Tied weights under each of their names, where they come once; Psyche loads no others.

    Args:
        tensors: `CausalLM.full_state_dict_iter()`.
        aliases: `building.tied_names` of the module.
    """
    groups: dict[str, set[str]] = {}
    for alias, name in aliases.items():
        groups.setdefault(name, {name}).add(alias)
    others = {name: sorted(group - {name}) for group in groups.values() for name in group}
    for name, tensor in tensors:
        yield name, tensor
        for other in others.get(name, ()):  # a copy: files hold no memory twice
            yield other, None if tensor is None else tensor.clone()


def save_model(
    path: Path,
    model: CausalLM,
    tensors: Iterator[tuple[str, Tensor | None]],
    side_files: Iterable[Path],
) -> None:
    """Writes a checkpoint folder; the rank that calls it gets the tensors.

    Args:
        path: the folder; replaced where it exists.
        model: for its configuration.
        tensors: `model.full_state_dict_iter()`; consumed even where writing fails, since the
            other ranks take part in each of its gathers.
        side_files: tokenizer and other files to go beside.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind, and a
            folder that was there stays.
        ValueError: the tensors are not those that `config.json` promises; they are kept.
    """
    try:
        with atomic_folder(path) as folder:
            write_tensors(folder, tensors)
            model.save_config(folder)
            for file in side_files:
                if not (folder / file.name).exists():
                    shutil.copyfile(file, folder / file.name)
        try:
            check_fit(resolve_model(str(path)), model.architecture)
        except ValueError as error:
            raise ValueError(f"{path} cannot be loaded again as it is: {error}") from error
    finally:
        for _ in tensors:
            pass
