"""Where a model comes from: files on disk or on the Hugging Face hub, or tensors from rank 0.

Everything here reads names and headers only, so that a bad `--model` is one line before
anything is spawned or loaded.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from psyche_fast import compat
from psyche_fast.locations import DUMMY, FRESH
from psyche_fast.models.fresh import dummy_folder, fresh_config, fresh_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DOWNLOAD = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# Mistral's and Meta's own formats stand beside the Hugging Face one in many repositories.
_SKIP = ["consolidated*", "original/*", "onnx/*"]
_RETRIES = 3
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


@dataclass(frozen=True)
class FilesSource:
    """A model as files: `config.json`, safetensors and what stands beside them.

    Attributes:
        files: the files' paths; they need not lie in one folder.
    """

    files: tuple[Path, ...]

    @staticmethod
    def from_strings(files: list[str]) -> FilesSource:
        """From paths as text; `~/` is this machine's home directory.

        Raises:
            ValueError: there is no such directory.
        """
        try:
            return FilesSource(tuple(Path(file).expanduser() for file in files))
        except RuntimeError as error:  # `~` of a user whom this machine does not know
            raise ValueError(f"the model's files, {files}: {error}") from error

    def named(self, name: str) -> Path | None:
        """The file called `name`, or None."""
        return next((file for file in self.files if file.name == name), None)

    @property
    def side_files(self) -> list[Path]:
        """What a checkpoint takes along: tokenizer, generation config, chat template."""
        return [
            file
            for file in self.files
            if file.name != "config.json"
            and not file.name.endswith((".safetensors", ".index.json"))
            and file.suffix in {".json", ".model", ".txt", ".jinja"}
        ]


@dataclass(frozen=True, eq=False)
class TensorsSource:
    """A model as rank 0 sends it: configuration and full tensors.

    Attributes:
        config_json: the text of `config.json`.
        tensors: tensors by checkpoint name, on the CPU or the device.
    """

    config_json: str
    tensors: dict[str, Tensor]


ModelSource = FilesSource | TensorsSource


@dataclass(frozen=True)
class ModelSummary:
    """What a model's headers tell.

    Attributes:
        model_type: `model_type` of the configuration; None where it has none.
        config: `config.json`.
        num_tensors: tensors in the checkpoint.
        num_parameters: their elements (tied weights once, where the checkpoint has them once).
    """

    model_type: str | None
    config: dict[str, Any]
    num_tensors: int
    num_parameters: int


def resolve_model(name_or_path: str) -> FilesSource:
    """Finds a model: a local folder, or an id on the Hugging Face hub, which is downloaded.

    Args:
        name_or_path: a folder (`~/` expanded), a hub id such as `owner/name` or, with a branch, tag
            or commit, `owner/name@revision`; or `dummy:` or `fresh:20M`, see `models.fresh`.

    Raises:
        ValueError: neither a folder nor downloadable.
    """
    if name_or_path == DUMMY:
        return resolve_model(str(dummy_folder()))
    if name_or_path.startswith(FRESH):
        return resolve_model(str(fresh_folder(name_or_path)))
    # Absolute: other ranks start in other directories.
    folder = Path(name_or_path).expanduser().absolute()
    if folder.is_dir():
        return FilesSource(tuple(sorted(file for file in folder.iterdir() if file.is_file())))
    if folder.exists():
        raise ValueError(f"--model: wanted a folder or a hub id, got the file {name_or_path}")
    looks_like_path = name_or_path.startswith((".", "/", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(name_or_path):
        raise ValueError(f"--model: there is no folder {name_or_path!r}, and it is no hub id")
    try:
        snapshot = _download(name_or_path)
    # The client's errors share no base class: HTTP, offline mode, cache and disk each have theirs.
    except Exception as error:
        raise ValueError(
            f"--model: {name_or_path!r} is neither a folder nor downloadable from the hub: "
            f"{_reason(error)}"
        ) from error
    return resolve_model(snapshot)


def _download(hub_id: str) -> str:
    """The folder of a model of the hub's; files that are there already are not fetched again."""
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    attempt = 0
    while True:
        try:
            return snapshot_download(
                name, revision=revision or None, allow_patterns=_DOWNLOAD, ignore_patterns=_SKIP
            )
        except (OSError, ValueError):  # an answer, no hub at all, the disk
            raise
        except Exception as error:
            # A reset connection is an error of the HTTP library's, of which the client lets pass
            # what it does not take up itself.
            if attempt == _RETRIES:
                raise
            log.warning("%s: %s; once more", hub_id, _reason(error))
            time.sleep(2.0**attempt)
            attempt += 1


def _reason(error: BaseException) -> str:
    """One line of an error of the hub's client, and of what it came from where that says more."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else repr(error)
    cause = str(error.__cause__ or "").strip().splitlines()
    return reason if not cause or cause[0] in reason else f"{reason} ({cause[0]})"


def read_config(source: ModelSource) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        ValueError: it is missing, not JSON, or not an object.
    """
    if isinstance(source, TensorsSource):
        what, text = "the model's config", source.config_json
    else:
        path = source.named("config.json")
        if path is None:
            raise ValueError(f"--model: there is no config.json in {_place(source)}")
        what = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--model: {path} cannot be read: {error}") from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--model: {what} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--model: {what}: wanted a JSON object, got {type(config).__name__}")
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is the language model's: multimodal ones nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """How many token ids a model knows; None where its configuration does not say."""
    for fields in (text_config(config), config):
        size = fields.get("vocab_size")
        if isinstance(size, int):
            return size
    return None


def read_model(name: str) -> dict[str, Any]:
    """The configuration of a folder, a `config.json`, `fresh:NAME` or a hub id, without weights.

    Raises:
        ValueError: there is none.
    """
    if name.startswith(FRESH):
        return read_config(TensorsSource(fresh_config(name), {}))
    if name == DUMMY:
        return read_config(resolve_model(name))
    path = Path(name).expanduser()
    if path.is_file():
        return read_config(TensorsSource(path.read_text(encoding="utf-8"), {}))
    if path.is_dir() or name.startswith((".", "/", "~")):
        return read_config(resolve_model(name))
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json")
    # The client's errors share no base class: HTTP, offline mode, cache and disk each have theirs.
    except Exception as error:
        raise ValueError(
            f"--model: {name!r} is no folder, nor on the hub: {_reason(error)}"
        ) from error
    return read_config(FilesSource((Path(file),)))


def weight_files(source: FilesSource) -> list[Path]:
    """The safetensors files that make up the model: the index's shards, or the one file.

    Raises:
        ValueError: none there, or a shard that the index names is missing.
    """
    index = source.named(_INDEX)
    if index is not None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (
            OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError
        ) as error:  # fmt: skip
            raise ValueError(f"--model: {index} is no safetensors index: {error!r}") from error
        found = [(shard, source.named(shard)) for shard in shards]
        missing = [shard for shard, path in found if path is None or not path.is_file()]
        if missing:
            raise ValueError(f"--model: {_list(missing)} named by {index} missing")
        return [path for _, path in found if path is not None]
    single = source.named(_SINGLE)
    files = [single] if single else [f for f in source.files if f.suffix == ".safetensors"]
    if not files:
        others = [f.name for f in source.files if f.suffix in {".bin", ".pt", ".pth", ".gguf"}]
        hint = f" (found {_list(others)}: convert it to safetensors)" if others else ""
        raise ValueError(f"--model: there are no safetensors in {_place(source)}{hint}")
    return files


def tensor_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, from the files' headers.

    Raises:
        ValueError: a file is missing, truncated or malformed, or a tensor stands in two files.
    """
    if isinstance(source, TensorsSource):
        return {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(source):
        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()  # it cannot be iterated itself
                own = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"--model: {path} is no complete safetensors file: {error}") from error
        twice = sorted(shapes.keys() & own.keys())
        if twice:
            raise ValueError(f"--model: {_list(twice)} in {path} and in another file too")
        shapes.update(own)
    return shapes


def check_model(source: ModelSource, architecture: str = "HfAuto") -> ModelSummary:
    """Checks a model as far as names and headers go, without loading it.

    Args:
        source: the model.
        architecture: the value of `--python-arch`; a Hugging Face one must be known to the
            installed transformers.

    Raises:
        ValueError: what is wrong, in one line.
    """
    config = read_config(source)
    shapes = tensor_shapes(source)
    if architecture.startswith("Hf"):
        check_huggingface_config(config)
    return ModelSummary(
        model_type=config.get("model_type"),
        config=config,
        num_tensors=len(shapes),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
    )


def check_huggingface_config(config: dict[str, Any]) -> None:
    """Checks that the installed transformers has this causal language model and can train it.

    Raises:
        ValueError: an unknown or missing `model_type`, or quantised weights.
    """
    from transformers import __version__ as version

    model_type = config.get("model_type")
    if model_type is None:
        raise ValueError("--model: config.json has no model_type")
    if model_type not in compat.CONFIG_MAPPING_NAMES:
        raise ValueError(f"--model: transformers {version} does not know model_type {model_type!r}")
    if model_type not in compat.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"--model: model_type {model_type!r} is no causal language model")
    if config.get("quantization_config"):
        raise ValueError("--model: quantised weights cannot be trained; dequantise them first")


def _place(source: FilesSource) -> str:
    folders = sorted({str(file.parent) for file in source.files})
    return _list(folders) if folders else "the list of files, which is empty"


def _list(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
