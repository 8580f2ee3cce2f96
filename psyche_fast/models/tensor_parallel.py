"""Tensor parallelism by the model's own plan (Transformers' `tp_plan`).

Linear layers and embeddings are split as torch's styles do. Experts are divided whole: a rank has
some of each layer's experts, all of them for the tokens that are routed to them, rather than a
slice of every expert. That is the same sum, its matrix products keep their size, and a shard of
stacked experts is cut between experts, where no chunk of DisTrO's is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from psyche_fast.compat import AsyncCollectiveTensor, tree_map_only
from psyche_fast.models.tensor_flow import partial_gradients
from psyche_fast.sharding import local_tensor

_COLWISE = {"colwise", "colwise_gather_output", "colwise_rep"}
_DENSE: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_EXPERTS = "moe_tp_experts"
_OWN_PARAMETERS = "local_params"
_LATENT = "mla_kv_a_proj"
_SUM_GRADIENT = "replicated_with_grad_allreduce"
_WHOLE = "replicate"
_SUPPORTED = [*_DENSE, _EXPERTS, _OWN_PARAMETERS, _LATENT, _SUM_GRADIENT, _WHOLE]
_ROUTED = ("hidden_states", "top_k_index", "top_k_weights")


def tensor_parallel(
    module: nn.Module,
    mesh: DeviceMesh,
    config: Any,
    aliases: dict[str, str],
    *,
    in_compiled_blocks: bool = False,
) -> None:
    """Splits the layers by the model's own plan.

    Args:
        module: on the meta device. Its `tp_plan` maps name patterns (`*` for a layer's number)
            to Transformers' styles.
        mesh: the ranks that share each layer.
        config: Transformers' configuration, for the numbers of heads; None for other models.
        aliases: tied names; both ends are split alike.
        in_compiled_blocks: the blocks around the layers are compiled.

    Raises:
        ValueError: no plan, a style that is not supported, or a size that does not divide.
    """
    plan = dict(getattr(module, "tp_plan", None) or {})
    if not plan:
        raise ValueError(f"--tensor-parallelism: {type(module).__name__} has no plan for it")
    chosen = _match(module, plan)
    _add_tied(module, chosen, aliases)
    _check_heads(config, chosen, mesh.size())
    modules = dict(module.named_modules())
    parameters = dict(module.named_parameters())
    for name, style in chosen.items():
        _check_size(name, modules.get(name, parameters.get(name)), style, mesh.size())
    partial_ones = _partial_gradients(module, chosen, mesh.size())
    for name, style in chosen.items():
        if name in parameters:
            owner, _, leaf = name.rpartition(".")
            _split(modules[owner], leaf, mesh, dim=_cut(parameters[name]))
        elif style in _DENSE:
            parallelize_module(modules[name], mesh, _DENSE[style](), src_data_rank=None)
        elif style == _EXPERTS:
            _divide_experts(modules[name], mesh)
        elif style == _OWN_PARAMETERS:
            _with_parameters(modules[name], local_tensor)
        elif style == _SUM_GRADIENT:
            _with_parameters(modules[name], partial(_sum_gradient, group=mesh.get_group()))
        elif style == _LATENT:
            _sum_rotary_gradient(modules[name], config.get_text_config().qk_rope_head_dim, mesh)
    for name in partial_ones:
        owner, _, leaf = name.rpartition(".")
        _with_parameters(modules[owner], partial(_sum_gradient, group=mesh.get_group()), {leaf})
    for name in chosen:
        if in_compiled_blocks and name in modules:
            _keep_out_of_graphs(modules[name])
    for alias, name in aliases.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(name))


def _partial_gradients(module: nn.Module, chosen: dict[str, str], ranks: int) -> set[str]:
    """The parameters of no style of the plan that meet only a rank's part of activations."""
    modules = dict(module.named_modules())

    def named(*styles: str) -> set[str]:
        return {name for name, style in chosen.items() if style in styles and name in modules}

    own = dict(module.named_parameters())
    handled = {f"{owner}.{leaf}" for owner in named(_SUM_GRADIENT, _OWN_PARAMETERS)
               for leaf in modules[owner]._parameters}  # fmt: skip
    return (
        partial_gradients(
            module,
            ranks,
            columns=named("colwise"),
            rows=named(*_DENSE, _EXPERTS) - named(*_COLWISE, "embedding_rowwise"),
            whole=named(*_COLWISE - {"colwise"}, "embedding_rowwise"),
            added=named(_LATENT),
            parameters={name: _cut(own[name]) for name in chosen if name in own},
        )
        - handled
    )


def _cut(parameter: Tensor) -> int:
    """The dimension that a parameter of no layer is split in."""
    return max(parameter.dim() - 2, 0)


def _keep_out_of_graphs(part: nn.Module) -> None:
    """Calls a part as it is where the block around it is compiled.

    DTensors do not survive compilation in torch 2.13 (backward fails), and most of what such a part
    takes is a product that no compiler makes faster. Of ways to leave one out, Dynamo heeds only a
    `__call__` of the class: hooks are inside of that.
    """
    kind: Any = type(part)  # nn.Module hides that its classes can be hashed
    part.__class__ = _uncompiled(kind)


class _Edge(torch.autograd.Function):
    """The identity between what is compiled and what is not, in both directions.

    Collectives that are under way are waited for: compiled code, unlike others, takes the tensor
    that stands for one as it is, and its gradient is lost.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _waited(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _waited(grads[0])


def _waited(tensor: Tensor) -> Tensor:
    arrived = tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
    return arrived.view_as(arrived)


@cache
def _uncompiled(kind: Any) -> Any:  # from a module's class to one of the same name
    # By a function of its own: to disable `nn.Module.__call__` itself would be for all modules.
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, _Edge.apply, (args, kwargs))
        return tree_map_only(Tensor, _Edge.apply, kind.__call__(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"__call__": torch.compiler.disable(call)})


def _match(module: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Styles by the names of modules, and of parameters that stand for themselves."""
    modules = dict(module.named_modules())
    names = [*modules, *(name for name, _ in module.named_parameters())]
    planned = {n: plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", n)) for n in names}
    chosen = {}
    for name, style in planned.items():
        owner = name.rpartition(".")[0]
        if style is None or (name not in modules and planned[owner] == _EXPERTS):
            continue
        parameter = name not in modules
        known = style in _SUPPORTED
        if parameter:
            known = style == _WHOLE or (style in _COLWISE and planned[owner] == _OWN_PARAMETERS)
        if not known:
            raise ValueError(
                f"--tensor-parallelism: {name} is to be split as {style!r}, which is not supported "
                f"(supported: {', '.join(_SUPPORTED)})"
            )
        if style != _WHOLE:
            chosen[name] = style
    if not any(style in _DENSE or style == _EXPERTS for style in chosen.values()):
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
    names = config.get_text_config().attribute_map
    text = config.get_text_config().to_dict()
    layers = text.get("per_layer_config") or {}  # some have other numbers of heads
    for key in ("num_attention_heads", "num_key_value_heads"):
        for part in (text, *layers.values()):
            count = part.get(names.get(key, key))
            if isinstance(count, int) and count % size:
                raise ValueError(f"--tensor-parallelism {size} does not divide {key} {count}")


def _check_size(name: str, part: nn.Module | Tensor | None, style: str, size: int) -> None:
    if style in (_SUM_GRADIENT, _LATENT, _OWN_PARAMETERS):
        return
    if isinstance(part, Tensor):
        what, count = "rows", part.shape[max(part.dim() - 2, 0)]
    elif style == _EXPERTS:
        what, count = "experts", _count_experts(name, part)
    elif isinstance(part, nn.Embedding):
        what, count = "vocabulary", part.num_embeddings
    elif isinstance(part, nn.Linear):
        colwise = style in _COLWISE
        what, count = ("outputs", part.out_features) if colwise else ("inputs", part.in_features)
    else:
        raise ValueError(
            f"--tensor-parallelism: {name} is a {type(part).__name__}; wanted a linear layer "
            "or an embedding"
        )
    if count % size:
        raise ValueError(f"--tensor-parallelism {size} does not divide {name}'s {what}, {count}")


def _count_experts(name: str, module: Any) -> int:
    """How many experts a module stacks in each of its parameters.

    Raises:
        ValueError: it is not of the form that Transformers' experts have.
    """
    count = getattr(module, "num_experts", None)
    takes = tuple(inspect.signature(module.forward).parameters)
    stacked = all(p.shape[0] == count for p in module._parameters.values() if p is not None)
    if not isinstance(count, int) or takes != _ROUTED or not stacked:
        raise ValueError(
            f"--tensor-parallelism: {name} is a {type(module).__name__}; wanted experts stacked in "
            f"each parameter, called with {', '.join(_ROUTED)}"
        )
    return count


def _split(module: nn.Module, leaf: str, mesh: DeviceMesh, *, dim: int) -> None:
    whole = module.get_parameter(leaf)
    part = distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
    setattr(module, leaf, nn.Parameter(part, requires_grad=whole.requires_grad))


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


class _Sum(torch.autograd.Function):
    """Adds up over the group; backward is the identity."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _sum_gradient(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed: Tensor = _SumGradient.apply(tensor, group)
    return summed


@contextmanager
def _replaced(
    module: nn.Module, replace: Callable[[Tensor], Tensor], names: set[str] | None = None
) -> Iterator[None]:
    """Other tensors in the place of a module's own parameters, or of those of the names.

    At each call, since FSDP2 puts other tensors there around it.
    """
    parameters = dict(module._parameters)
    for name, parameter in parameters.items():
        if parameter is not None and (names is None or name in names):
            module._parameters[name] = replace(parameter)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(parameters)


def _with_parameters(
    module: nn.Module, replace: Callable[[Tensor], Tensor], names: set[str] | None = None
) -> None:
    forward = module.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        with _replaced(module, replace, names):
            return forward(*args, **kwargs)

    module.forward = replaced  # type: ignore[method-assign]


def _sum_rotary_gradient(module: nn.Module, rotary: int, mesh: DeviceMesh) -> None:
    """For a whole projection whose last outputs, the rotary ones, meet only this rank's heads."""
    forward, group = module.forward, mesh.get_group()

    def summed(*args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        latent, rotated = output.split([output.shape[-1] - rotary, rotary], dim=-1)
        return torch.cat([latent, _sum_gradient(rotated, group)], dim=-1)

    module.forward = summed  # type: ignore[method-assign]


def _divide_experts(module: Any, mesh: DeviceMesh) -> None:
    """Keeps this rank's experts; each token's outputs are added up over the ranks."""
    own = module.num_experts // mesh.size()
    first, group = own * mesh.get_local_rank(), mesh.get_group()
    for leaf in list(module._parameters):
        if module._parameters[leaf] is not None:
            _split(module, leaf, mesh, dim=0)
    module.num_experts = own
    forward = module.forward

    def divided(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        hidden_states = _sum_gradient(hidden_states, group)
        top_k_weights = _sum_gradient(top_k_weights, group)
        here = (top_k_index >= first) & (top_k_index < first + own)
        token, route = here.nonzero(as_tuple=True)
        expert = top_k_index[token, route] - first
        weight = top_k_weights[token, route]
        if not len(token):
            # One token at no weight, so that backward runs here too: it is collective.
            token = expert = torch.zeros_like(top_k_index[0, :1])
            weight = top_k_weights[0, :1] * 0
        with _replaced(module, local_tensor):
            output = forward(hidden_states[token], expert[:, None], weight[:, None])
        total = torch.zeros_like(hidden_states).index_add(0, token, output.to(hidden_states.dtype))
        return _Sum.apply(total, group)

    module.forward = divided
