"""Every name of torch, Transformers and Liger-Kernel that is private or moves between versions.

What is used of them beyond their documented interface is in this file alone, so that a new version
is tried by reading one file; `pyproject.toml` has the versions below which all of it is known to
work. Names that are imported are in a table and are looked up when they are first asked for: this
module imports neither torch nor Transformers by itself. `torch._foreach_*` is documented, and used
where it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

# Private or undocumented in all of torch 2.11 .. 2.13 and transformers 5.17 .. 5.23.
_NAMES = {
    # torch
    "AsyncCollectiveTensor": "torch.distributed._functional_collectives",
    "FakeTensor": "torch._subclasses.fake_tensor",
    "FakeStore": "torch.testing._internal.distributed.fake_pg",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "StorageWeakRef": "torch.multiprocessing.reductions",
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "tree_leaves": "torch.utils._pytree",
    "tree_map_only": "torch.utils._pytree",
    # Transformers: which architectures there are
    "CONFIG_MAPPING": "transformers.models.auto.configuration_auto",
    "CONFIG_MAPPING_NAMES": "transformers.models.auto.configuration_auto",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "transformers.models.auto.modeling_auto",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "transformers.models.auto.modeling_auto",
    # Transformers: how checkpoints become models and back
    "WeightConverter": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "rename_source_key": "transformers.core_model_loading",
    "revert_weight_conversion": "transformers.core_model_loading",
    # Transformers: attention
    "sdpa_attention_forward": "transformers.integrations.sdpa_attention",
    # Liger-Kernel 0.6
    "MODEL_TYPE_TO_APPLY_LIGER_FN": "liger_kernel.transformers.monkey_patch",
    "_apply_liger_kernel_to_instance": "liger_kernel.transformers",
}


def cpu_multiplies_bf16() -> bool:
    """Whether torch has oneDNN multiply matrices of bfloat16 on this CPU.

    Its own loops, which it takes otherwise, are some hundred times slower than float32's products.
    """
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # built without oneDNN, as for Apple's
        return False


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


# torch


def all_gather_single() -> Any:
    """Torch 2.13's name; `all_gather_into_tensor` before, of which 2.13 warns."""
    import torch.distributed as dist

    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_into(
    group: Any, rows: torch.Tensor, sent: torch.Tensor, timeout: timedelta
) -> dist.Work:
    """Of a gloo group beside torch's own: stubs and `dist` lack what it takes (2.11 .. 2.13)."""
    from torch.distributed import distributed_c10d

    options = distributed_c10d.AllgatherOptions()
    options.timeout = timeout
    work: dist.Work = group.allgather([list(rows.unbind(0))], [sent], options)
    return work


def broadcast_from(group: Any, content: torch.Tensor, root: int, timeout: timedelta) -> dist.Work:
    """As `all_gather_into`."""
    from torch.distributed import distributed_c10d

    options = distributed_c10d.BroadcastOptions()
    options.rootRank, options.timeout = root, timeout
    work: dist.Work = group.broadcast([content], options)
    return work


def group_timeout() -> timedelta:
    """What groups of `new_group` have (2.11 .. 2.13)."""
    from torch.distributed import distributed_c10d

    timeout: timedelta = distributed_c10d.default_pg_timeout
    return timeout


def record_memory_history(on: bool) -> None:
    """Has CUDA's allocator keep who asked for what, or no longer (2.11 .. 2.13)."""
    import torch

    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def dump_memory_snapshot(path: Path) -> None:
    """Writes what CUDA's allocator holds, for pytorch.org/memory_viz (2.11 .. 2.13)."""
    import torch

    torch.cuda.memory._dump_snapshot(str(path))


def set_default_timeout(timeout: timedelta) -> None:
    """Of the default process group and of all that are created from now on (2.11 .. 2.13).

    Groups of a device mesh and of `new_group` ignore `init_process_group`'s own: the module's
    default is what counts.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    if dist.is_initialized():
        world = dist.group.WORLD
        assert world is not None
        for device in world._device_types:
            backend = world._get_backend(device)
            # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
            getattr(backend, "wrapped_pg", backend)._set_default_timeout(timeout)


def collectives_trace() -> bytes:
    """The last collectives of all groups as JSON, of torch's flight recorder (2.11 .. 2.13)."""
    from torch._C import _distributed_c10d

    trace: bytes = _distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
    return trace


def default_store() -> dist.Store:
    """The store of the default process group (2.11 .. 2.13)."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def storage_key(tensor: torch.Tensor) -> int:
    """The same for tensors that share their memory, one without content too (2.11 .. 2.13)."""
    return tensor.untyped_storage()._cdata


def without_values(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls an operator on tensors without content, where torch would want some (2.11 .. 2.13).

    Questions are answered by yes, numbers are 0, `nonzero` finds all that there may be, and grouped
    products are of any type.
    """
    import torch

    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default:
        return args[0].dtype == torch.bool or 0
    if func is aten.nonzero.default:
        return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
    if func is aten._grouped_mm.default:
        a, b = args[:2]
        if a.dim() == b.dim() == 2:
            offsets = args[2] if len(args) > 2 else kwargs["offs"]
            return a.new_empty(offsets.numel(), a.shape[0], b.shape[1])
        if a.dim() == 2:
            return a.new_empty(a.shape[0], b.shape[-1])
        return a.new_empty(a.shape[1], b.shape[-1])
    return func(*args, **kwargs)


def allow_recompilations(count: int) -> None:
    """At least so many of one function by `torch.compile` (2.11 .. 2.13)."""
    import torch._dynamo  # takes a second

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)


# Transformers


def decoded(config: dict[str, Any]) -> Any:
    """A copy of `config.json` with its tagged numbers (infinity, NaN) as floats (5.17 .. 5.23)."""
    from transformers import PreTrainedConfig

    return PreTrainedConfig._decode_special_floats(copy.deepcopy(config))


def supported_attention(model: Any) -> tuple[bool, bool]:
    """Whether a model, or a class of them, has flash attention, and sdpa (5.17 .. 5.23)."""
    return bool(model._supports_flash_attn), bool(model._supports_sdpa)


def attention_of(model: Any) -> str:
    """What attends in a model (5.17 .. 5.23)."""
    return model.config._attn_implementation or "eager"


def dtype_plan(model: Any, dtype: torch.dtype) -> Iterable[str]:
    """Patterns of parameters that stay in fp32 whatever the rest is (5.17 .. 5.23)."""
    plan: Iterable[str] = model._get_dtype_plan(dtype)
    return plan


def block_classes(module: Any) -> Iterable[str] | None:
    """Names of the classes of a model's blocks; None of one that says none (5.17 .. 5.23)."""
    names: Iterable[str] | None = getattr(module, "_no_split_modules", None)
    return names


def tied_weights(module: Any) -> dict[str, str]:
    """Names that checkpoints leave out, and the ones that stand for them (5.17 .. 5.23)."""
    return getattr(module, "all_tied_weights_keys", None) or {}


def ignored_on_load(model: Any) -> tuple[list[str], list[str]]:
    """Patterns of names that a checkpoint may have too many, and may lack (5.17 .. 5.23)."""
    unexpected = list(model._keys_to_ignore_on_load_unexpected or [])
    return unexpected, list(model._keys_to_ignore_on_load_missing or [])


def weight_conversions(model: Any) -> list[Any]:
    """What saving a model has to undo (5.17 .. 5.23)."""
    conversions: list[Any] = model._weight_conversions
    return conversions


def set_weight_conversions(model: Any, conversions: list[Any]) -> None:
    """See `weight_conversions`."""
    model._weight_conversions = conversions


def checkpoint_activations(model: Any) -> None:
    """Transformers 5.23's name; `gradient_checkpointing_enable` before."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
