"""Sharding a model over ranks with FSDP2, block by block."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from psyche_fast.compat import block_classes
from psyche_fast.distro.chunks import chunk_side

# The usual compression_chunk, which is not known when a model is loaded. What is on the edges of
# these chunks is, but for odd sizes, on those of chunks of 32 and 16 too.
_CHUNK = 64


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The modules to shard, and to checkpoint, one by one: the transformer's blocks.

    They are `fsdp_modules` (class names or modules) where the module has it, Transformers'
    `_no_split_modules`, or else every child of every `nn.ModuleList`. Blocks inside blocks are not
    counted again, and what shares parameters with the rest of the model belongs to the rest.
    Classes are looked up by name, which `shard` changes: ask before.

    Returns:
        modules by name, in order.
    """
    hint = getattr(module, "fsdp_modules", None) or block_classes(module)
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    found: dict[str, nn.Module] = {}
    lists: set[str] = set()
    for name, child in module.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(child, nn.ModuleList):
            lists.add(name)
        if hint:
            wanted = type(child).__name__ in hint or any(child is item for item in hint)
        else:
            wanted = bool(name) and parent in lists
        if not wanted or any(name.startswith(f"{block}.") for block in found):
            continue
        own = set().union(*(names[id(p)] for p in child.parameters()))
        if all(n.startswith(f"{name}.") for n in own):
            found[name] = child
    return found


def shard(module: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Applies FSDP2 to each block and to what is left.

    Gradients are averaged over the mesh, in fp32 whatever the parameters' type.

    Args:
        module: the model.
        mesh: the ranks.
        compute_dtype: what parameters are rounded to where they are gathered; None for their type.

    Raises:
        ValueError: the model's parameters are of different types, or a layer has a backward of its
            own, in which FSDP2 would not gather them.
    """
    for name, child in module.named_modules():
        if hasattr(child, "backward_pass"):
            raise ValueError(
                f"--data-parallelism: {name}, a {type(child).__name__}, computes its backward "
                "itself, outside of FSDP2's; train it with --replicas"
            )
    by_dtype: dict[torch.dtype, str] = {}
    for name, param in module.named_parameters():
        by_dtype.setdefault(param.dtype, name)
    if len(by_dtype) > 1:
        both = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
        raise ValueError(
            f"--data-parallelism wants parameters of one type, but {both}; "
            "use --param-dtype float32"
        )
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
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
