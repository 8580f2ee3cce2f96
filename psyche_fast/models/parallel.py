"""Splitting a model over ranks: tensor parallelism by its own plan, then FSDP2 by block."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from psyche_fast.distro.layout import chunk_side

_COLWISE = {"colwise", "colwise_gather_output", "colwise_rep"}
# The usual compression_chunk, which is not known when a model is loaded. What is on the edges of
# these chunks is, but for odd sizes, on those of chunks of 32 and 16 too.
_CHUNK = 64
_SUM_GRADIENT = "replicated_with_grad_allreduce"
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The modules to shard, and to checkpoint, one by one: the transformer's blocks.

    They are ``fsdp_modules`` (class names or modules) where the module has it, Transformers'
    ``_no_split_modules``, or else every child of every ``nn.ModuleList``.

    Returns:
        modules by name, in order.
    """
    hint = getattr(module, "fsdp_modules", None) or getattr(module, "_no_split_modules", None)
    if hint:
        return {
            name: child
            for name, child in module.named_modules()
            if type(child).__name__ in hint or any(child is item for item in hint)
        }
    return {
        f"{name}.{index}" if name else index: child
        for name, parent in module.named_modules()
        if isinstance(parent, nn.ModuleList)
        for index, child in parent.named_children()
    }


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Applies FSDP2 to each block and to what is left.

    Gradients are averaged over the mesh, in fp32 whatever the parameters' type.

    Raises:
        ValueError: the model's parameters are of different types.
    """
    by_dtype: dict[torch.dtype, str] = {}
    for name, param in module.named_parameters():
        by_dtype.setdefault(param.dtype, name)
    if len(by_dtype) > 1:
        both = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
        raise ValueError(
            f"--data-parallelism wants parameters of one type, but {both}; "
            "use --param-dtype float32"
        )
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    place = partial(_placement, ranks=mesh.size())
    for block in blocks(module).values():
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=place)


def _placement(param: nn.Parameter, ranks: int) -> Shard | None:
    """A dimension whose even cut is on the edges of DisTrO's chunks; None for FSDP2's choice.

    What is cut there each rank compresses where it lies. The first dimension goes first, since
    FSDP2 gathers the others with a copy more, and takes even cuts of these only.
    """
    local = param.to_local().shape if isinstance(param, DTensor) else param.shape
    for dim, (whole, size) in enumerate(zip(param.shape, local, strict=True)):
        side = chunk_side(whole, _CHUNK) if dim >= param.dim() - 2 else 1
        if size % ranks == 0 and size // ranks % side == 0:
            return Shard(dim)
    return None


def tensor_parallel(
    module: nn.Module, mesh: DeviceMesh, config: Any, aliases: dict[str, str]
) -> None:
    """Splits the layers by the model's own plan.

    Args:
        module: on the meta device. Its ``tp_plan`` maps name patterns (``*`` for a layer's number)
            to Transformers' styles.
        mesh: the ranks that share each layer.
        config: Transformers' configuration, for the numbers of heads; None for other models.
        aliases: tied names; both ends are split alike.

    Raises:
        ValueError: no plan, a style other than those for dense layers, or a size that does not
            divide.
    """
    plan = dict(getattr(module, "tp_plan", None) or {})
    if not plan:
        raise ValueError(f"--tensor-parallelism: {type(module).__name__} has no plan for it")
    chosen = _match(module, plan)
    _add_tied(module, chosen, aliases)
    _check_heads(config, chosen, mesh.size())
    for name, style in chosen.items():
        _check_size(name, module.get_submodule(name), style, mesh.size())
    for name, style in chosen.items():
        child = module.get_submodule(name)
        if style == _SUM_GRADIENT:
            _sum_gradients(child, mesh.get_group())
        else:
            parallelize_module(child, mesh, _STYLES[style](), src_data_rank=None)
    for alias, name in aliases.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(name))


def _match(module: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    modules = dict(module.named_modules())
    chosen = {}
    for name in [*modules, *(name for name, _ in module.named_parameters())]:
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None:
            continue
        known = style in _STYLES or style == _SUM_GRADIENT
        if not known or name not in modules:
            raise ValueError(
                f"--tensor-parallelism: {name} is to be split as {style!r}, which is not supported "
                f"(supported, for dense layers: {', '.join([*_STYLES, _SUM_GRADIENT])})"
            )
        chosen[name] = style
    if not any(style in _STYLES for style in chosen.values()):
        raise ValueError("--tensor-parallelism: the model's plan names none of its layers")
    return chosen


def _add_tied(module: nn.Module, chosen: dict[str, str], aliases: dict[str, str]) -> None:
    for pair in aliases.items():
        names = [name.rpartition(".")[0] for name in pair]
        for one, other in (names, names[::-1]):
            if one not in chosen or other in chosen:
                continue
            rows_split = chosen[one] in _COLWISE or chosen[one] == "embedding_rowwise"
            embedding = isinstance(module.get_submodule(other), nn.Embedding)
            if not rows_split:
                raise ValueError(
                    f"--tensor-parallelism: {one} is to be split as {chosen[one]!r}, "
                    f"but it is tied to {other}"
                )
            chosen[other] = "embedding_rowwise" if embedding else "colwise_gather_output"


def _check_heads(config: Any, chosen: dict[str, str], size: int) -> None:
    if config is None or not any(s == "colwise" and "att" in name for name, s in chosen.items()):
        return
    text = config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, key, None)
        if isinstance(count, int) and count % size:
            raise ValueError(f"--tensor-parallelism {size} does not divide {key} {count}")


def _check_size(name: str, module: nn.Module, style: str, size: int) -> None:
    if style == _SUM_GRADIENT:
        return
    if isinstance(module, nn.Embedding):
        what, count = "vocabulary", module.num_embeddings
    elif isinstance(module, nn.Linear):
        colwise = style in _COLWISE
        what, count = (
            ("outputs", module.out_features) if colwise else ("inputs", module.in_features)
        )
    else:
        raise ValueError(
            f"--tensor-parallelism: {name} is a {type(module).__name__}; wanted a linear layer "
            "or an embedding"
        )
    if count % size:
        raise ValueError(f"--tensor-parallelism {size} does not divide {name}'s {what}, {count}")


class _SumGradient(torch.autograd.Function):
    """The identity; backward adds up the gradient over the group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """For whole parameters that meet only this rank's heads, such as norms of queries and keys."""
    forward = module.forward

    def summed(*args: Any, **kwargs: Any) -> Any:
        # At each call, since FSDP2 puts other tensors in the parameters' place around it.
        parameters = dict(module._parameters)
        for name, param in parameters.items():
            if param is not None:
                module._parameters[name] = _SumGradient.apply(param, group)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(parameters)

    module.forward = summed  # type: ignore[method-assign]
