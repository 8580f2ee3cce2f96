"""What tensor parallelism does to the parts of a model that its plan does not name.

Between a column-split and a row-split layer each rank computes with its own columns. A parameter
that it uses whole there gets a gradient from these columns only, which has to be added up over the
ranks; a sum over the columns would be a sum of some. Both are found by following a forward, without
values, in which the layers of the plan give what they will give on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from psyche_fast.compat import (
    TorchDispatchMode,
    attention_of,
    storage_key,
    tree_leaves,
    without_values,
)

_TOKENS = 7  # odd, unlike what ranks divide
_SUMS = {
    "mean", "sum", "prod", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm",
    "amax", "amin", "max", "min", "argmax", "argmin", "logsumexp", "_softmax", "_log_softmax",
    "cumsum", "topk", "sort", "native_layer_norm", "_fused_rms_norm",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm"}


@dataclass(frozen=True)
class _Kind:
    """What a tensor depends on.

    Attributes:
        columns: how many columns of a split layer's output it is made of; empty outside.
        names: parameters, as long as it depends on nothing else.
        given: on the tokens.
        active: on tokens and parameters.
        added: active, and its gradient is added up over the ranks already.
    """

    columns: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    given: bool = False
    active: bool = False
    added: bool = False


class _Follow(TorchDispatchMode):
    """Knows each tensor's kind, by its memory: views are of the same kind."""

    def __init__(self, split: set[str]) -> None:
        super().__init__()
        self.split = split
        """Parameters that only their layers can use."""
        self.in_layer = False
        self.inside: set[str] = set()
        self.outside: set[str] = set()
        self.problem: str | None = None
        self._kinds: dict[int, tuple[_Kind, Tensor]] = {}

    def mark(self, tensor: Tensor, kind: _Kind) -> Tensor:
        """Gives a tensor a kind."""
        self._kinds[storage_key(tensor)] = kind, tensor  # kept: memory may not be used again
        return tensor

    def kind(self, tensor: Tensor) -> _Kind:
        """A tensor's kind."""
        return self._kinds.get(storage_key(tensor), (_Kind(), tensor))[0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator; what it gives is of the kind that its tensors are of together."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        kinds = [self.kind(t) for t in tensors]
        result = without_values(func, args, kwargs or {})
        self._look(func.overloadpacket.__name__, args, tensors, kinds)
        kind = _joined(kinds)
        if kind != _Kind():
            for t in tree_leaves(result):
                if isinstance(t, Tensor) and (t.is_floating_point() or kind.columns):
                    self.mark(t, kind)
                elif isinstance(t, Tensor):  # no gradient goes through it
                    self.mark(t, _Kind(given=True))
        return result

    def _look(self, name: str, args: Any, tensors: list[Tensor], kinds: list[_Kind]) -> None:
        names = frozenset[str]().union(*(kind.names for kind in kinds))
        if not self.in_layer and (alone := names & self.split):
            self.problem = f"{name} of {min(alone)}, a part, outside of its layer"
        if not any(kind.columns for kind in kinds):
            if any(kind.given or kind.active for kind in kinds):
                self.outside |= names
            return
        self.inside |= names
        if any(kind.active and not (kind.columns or kind.added) for kind in kinds):
            self.problem = f"{name} of a part and what all ranks compute"
        x, kind = tensors[0], kinds[0]
        # More dimensions are those of heads.
        if x.dim() > 3 or not x.dim() or x.shape[-1] not in kind.columns:
            return
        if name in _PRODUCTS and not all(k.columns for k in kinds[:2]):
            self.problem = f"{name} over what is split"
        if name in _SUMS:
            dims = next((a for a in args[1:] if isinstance(a, (int, list, tuple))), None)
            dims = [dims] if isinstance(dims, int) else dims or [-1]
            if name == "native_layer_norm" or any(d in (-1, x.dim() - 1) for d in dims):
                self.problem = f"{name} over what is split"


def _joined(kinds: list[_Kind]) -> _Kind:
    columns = frozenset[int]().union(*(kind.columns for kind in kinds))
    if columns:
        return _Kind(columns=columns)
    names = frozenset[str]().union(*(kind.names for kind in kinds))
    given, active = any(kind.given for kind in kinds), any(kind.active for kind in kinds)
    if active or (names and given):
        added = not names and all(kind.added or not kind.active for kind in kinds)
        return _Kind(active=True, added=added)
    return _Kind(names=names, given=given)


def partial_gradients(
    module: nn.Module,
    ranks: int,
    *,
    columns: set[str],
    rows: set[str],
    whole: set[str],
    added: set[str],
    parameters: dict[str, int],
) -> set[str]:
    """The whole parameters whose gradients come from one rank's columns.

    Args:
        module: on the meta device, not yet split.
        ranks: that share each layer.
        columns: names of modules whose output is a rank's part of the last dimension.
        rows: of modules that take such a part and give a sum over the ranks.
        whole: of the plan's other modules: on every rank they give the same.
        added: of modules whose outputs' gradients are added up over the ranks.
        parameters: the dimension that each split parameter is split in, by name.

    Raises:
        ValueError: something would be computed from a part as if it were the whole.
    """
    split = columns | rows | whole
    follow = _Follow({n for n, _ in module.named_parameters() if n.rpartition(".")[0] in split})
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        tensor = torch.empty_like(parameter, device="meta", requires_grad=False)
        if name in parameters:
            dim = parameters[name]
            tensor = tensor.narrow(dim, 0, tensor.shape[dim] // ranks).clone()
            follow.mark(tensor, _Kind(columns=frozenset([-1])))
        else:
            follow.mark(tensor, _Kind(names=frozenset([name])))
        state[name] = tensor
    state |= {n: torch.empty_like(b, device="meta") for n, b in module.named_buffers()}

    def act(part: nn.Module, forward: Callable[..., Any], group: set[str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if group is rows:
                x = next(iter((*args, *kwargs.values())))
                size = part.out_features if isinstance(part, nn.Linear) else x.shape[-1]
                return follow.mark(x.new_empty(*x.shape[:-1], size), _Kind(active=True))
            follow.in_layer = True
            output = forward(*args, **kwargs).clone()
            follow.in_layer = False
            if group is columns:
                size = output.shape[-1] // ranks
                return follow.mark(output[..., :size].clone(), _Kind(columns=frozenset([size])))
            return follow.mark(output, _Kind(active=True, added=group is added))

        return call

    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    modules = dict(module.named_modules())
    acting = {
        modules[name]: act(modules[name], modules[name].forward, group)
        for group in (columns, rows, whole, added)
        for name in group
    }
    try:
        with torch.no_grad(), _acting(module, acting), follow:
            follow.mark(tokens, _Kind(given=True))
            call: tuple[tuple[Tensor, ...], dict[str, Any]]
            call = (tokens,), {"labels": None, "position_ids": None}
            if isinstance(module, PreTrainedModel):
                call = (), {"input_ids": tokens, "use_cache": False}
            torch.func.functional_call(module, state, *call)
        problem = follow.problem
    # Layers that reckon with sizes of the whole fail in any way.
    except Exception as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
    if problem is None and (mixed := follow.inside & follow.outside):
        problem = f"{min(mixed)} inside and outside"
    if problem is not None:
        raise ValueError(
            f"--tensor-parallelism: {type(module).__name__} cannot compute with a rank's part of "
            f"its layers: {problem}"
        )
    return follow.inside


@contextmanager
def _acting(module: nn.Module, acting: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for the layers of the plan; attention is the plain one."""
    own = {part: part.__dict__.get("forward") for part in acting}
    attention = attention_of(module) if isinstance(module, PreTrainedModel) else ""
    try:
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")
        for part, forward in acting.items():
            part.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for part, before in own.items():
            part.__dict__.pop("forward", None)
            if before is not None:
                part.forward = before
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(attention)
