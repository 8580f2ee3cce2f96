"""Transformers' causal language models: built without weights, and their checkpoint formats."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from psyche_fast import compat
from psyche_fast.compat import CONFIG_MAPPING, WeightConverter, WeightRenaming
from psyche_fast.models.building import parameters_on_meta
from psyche_fast.models.source import check_huggingface_config
from psyche_fast.models.weights import Conversion, LoadPlan

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def build(
    config_dict: dict[str, Any],
    param_dtype: torch.dtype,
    attn_implementation: str,
    sequence_length: int | None,
) -> PreTrainedModel:
    """Builds a model with parameters on the meta device and real buffers.

    Args:
        config_dict: `config.json`.
        param_dtype: type of what checkpoints hold, but for what the architecture keeps in fp32;
            other buffers are as `from_pretrained` has them, computed in fp32.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
        sequence_length: tokens per row; raises `max_position_embeddings` where that is less and a
            buffer grows with it. Elsewhere the number says which function of the positions the
            model has learned (dynamic rotary frequencies, longrope).

    Raises:
        ValueError: an unknown model, a malformed configuration, an attention implementation that
            the model has not, or a sequence longer than its table of learned positions.
    """
    check_huggingface_config(config_dict)
    try:
        config = CONFIG_MAPPING[config_dict["model_type"]].from_dict(compat.decoded(config_dict))
    # Each architecture validates in its own way, and the classes of errors differ as much.
    except Exception as error:
        raise ValueError(f"--model: config.json: {' '.join(str(error).split())}") from error
    for name, value in config.get_text_config().to_dict().items():
        if "z_loss" in name and value:
            raise ValueError(
                f"--model: config.json wants {name} {value} beside the cross-entropy, which is not "
                "supported; set it to 0"
            )
    model = _construct(config, param_dtype, attn_implementation)
    raised = copy.deepcopy(config)
    text = raised.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    for name in ("max_target_positions", "max_seq_len"):
        most = getattr(text, name, None)
        if limit is None and sequence_length and most and sequence_length > most:
            raise ValueError(
                f"--sequence-length {sequence_length} is more than the {name} of {most} in "
                "config.json; shorten it, or raise the number where no weights hang on it"
            )
    if sequence_length is None or not limit or limit < 0 or sequence_length <= limit:
        return model  # some say -1 for no limit
    text.max_position_embeddings = sequence_length
    longer = _construct(raised, param_dtype, attn_implementation)
    shapes = {name: tensor.shape for name, tensor in _tensors(model)}
    tables = [name for name, tensor in _tensors(longer) if tensor.shape != shapes[name]]
    learned = [name for name, _ in longer.named_parameters() if name in tables]
    if learned:
        raise ValueError(
            f"--sequence-length {sequence_length} is more than the {limit} positions that "
            f"{', '.join(learned)} has learned"
        )
    return longer if tables else model


def _construct(
    config: PreTrainedConfig, param_dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    def constructed(dtype: torch.dtype) -> PreTrainedModel:
        with parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=False,  # and do not ask: what is in a folder is data
            )
            return model

    try:
        model = constructed(param_dtype)
        # Constructors compute their buffers in the type given.
        rounded = param_dtype != torch.float32 and not all(b.is_meta for b in model.buffers())
        exact = constructed(torch.float32) if rounded else model
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"--model: {config.model_type} cannot be built with --attn-implementation "
            f"{attn_implementation}: {' '.join(str(error).split())}"
        ) from error
    model.tie_weights()
    # Some architectures want parts in fp32 whatever the rest is (as from_pretrained has it).
    kept = [re.compile(glob.replace("*", ".*")) for glob in compat.dtype_plan(model, param_dtype)]
    for name, tensor in _tensors(model):
        if any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()
    values = dict(exact.named_buffers())
    for name, buffer in model.named_buffers():
        if buffer is not values[name]:
            buffer.copy_(values[name])
    return model


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def plan_load(model: PreTrainedModel, names: list[str]) -> LoadPlan:
    """Maps a checkpoint's names to the model's, as `from_pretrained` does.

    Transformers keeps some weights in another form than checkpoints do (experts stacked into one
    tensor, renamed or split projections) and knows how to convert them; so do we, by its rules.

    Args:
        model: built, not yet split over ranks.
        names: the checkpoint's tensor names.
    """
    own = model.state_dict()
    transforms = compat.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    direct: dict[str, str] = {}
    groups: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
    unexpected = []
    for name in sorted(names, key=compat.dot_natural_key):  # experts in the order of their numbers
        target, pattern = compat.rename_source_key(
            name, renamings, converters, model.base_model_prefix, own
        )
        if target not in own and name in own:
            target, pattern = name, None
        if target not in own:
            unexpected.append(name)
        elif pattern is None:
            direct[target] = name
        else:
            group = groups.setdefault(target, (copy.deepcopy(by_pattern[pattern]), []))
            group[1].append((name, pattern))
    # What saving has to undo: only what this checkpoint needed.
    compat.set_weight_conversions(model, [t for t in transforms if t.was_used()])
    return LoadPlan(
        direct,
        [_conversion(model, target, *group) for target, group in groups.items()],
        [name for name in unexpected if not _ignorable(model, name)],
        _optional(model),
    )


def _conversion(
    model: PreTrainedModel,
    target: str,
    converter: Any,
    sources: list[tuple[str, str]],
) -> Conversion:
    def convert(tensors: dict[int, Tensor]) -> dict[str, Tensor]:
        for at, tensor in tensors.items():
            name, pattern = sources[at]
            converter.add_tensor(target, name, pattern, tensor)
        try:
            converted = converter.convert(target, model=model, config=model.config)
        except (ValueError, RuntimeError, IndexError, KeyError) as error:
            raise ValueError(
                f"--model: {target} cannot be made of {sources[0][0]} and the tensors that belong "
                f"with it: {' '.join(str(error).split())}"
            ) from error
        return {n: t[0] if isinstance(t, list) else t for n, t in converted.items()}

    names = [name for name, _ in sources]
    numbers = [_EXPERT.search(name) for name in names]
    experts = [int(number[1]) for number in numbers if number is not None]
    return Conversion(target, names, convert, experts if len(experts) == len(names) else None)


def _ignorable(model: PreTrainedModel, name: str) -> bool:
    """Whether a checkpoint may have it although the model has not: what is recomputed anyway."""
    patterns = compat.ignored_on_load(model)[0]
    leaves = {buffer.rpartition(".")[2] for buffer, _ in model.named_buffers()}
    # Older checkpoints hold buffers, such as rotary frequencies, that are no longer saved.
    return name.rpartition(".")[2] in leaves - {"weight", "bias"} or any(
        re.search(pattern, name) for pattern in patterns
    )


def _optional(model: PreTrainedModel) -> frozenset[str]:
    patterns = compat.ignored_on_load(model)[1]
    buffers = {name for name, _ in model.named_buffers()}
    return frozenset(n for n in buffers if any(re.search(pattern, n) for pattern in patterns))


def needs_reverting(model: PreTrainedModel) -> bool:
    """Whether the checkpoint's form of some tensors is made of several of the model's."""
    return any(isinstance(t, WeightConverter) for t in compat.weight_conversions(model))


def revert(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under the names and in the form of the checkpoint it came from."""
    for name, tensor in compat.revert_weight_conversion(model, tensors).items():
        # Stacked experts come out as views of one tensor, which would be saved whole each.
        whole = tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes
        yield name, tensor if whole else tensor.clone()


def save_config(
    model: PreTrainedModel, class_name: str, dtype: torch.dtype | None, folder: Path
) -> None:
    """Writes `config.json`.

    Args:
        model: the model.
        class_name: its class, whose name FSDP2 has changed.
        dtype: of the parameters beside it; None for the model's.
        folder: where to.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype or config.dtype
    config.architectures = [class_name]
    config.save_pretrained(folder)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recomputes each block's activations in backward.

    Raises:
        ValueError: the architecture does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} does not support activation checkpointing")
    compat.checkpoint_activations(model)


def apply_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Replaces parts of the model by Liger-Kernel's Triton kernels.

    Raises:
        ValueError: not on CUDA, not installed, or the architecture has no such kernels.
    """
    if device.type != "cuda":
        raise ValueError(f"--liger needs a CUDA device, got {device.type}")
    try:
        apply, known = compat._apply_liger_kernel_to_instance, compat.MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(
            f"--liger needs the liger_kernel package: pip install 'psyche-fast[liger]' ({error})"
        ) from error
    if model.config.model_type not in known:
        raise ValueError(f"--liger: Liger-Kernel has no kernels for {model.config.model_type}")
    apply(model=model)
