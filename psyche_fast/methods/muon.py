"""Muon: orthogonalised momentum for hidden matrices, as `torch.optim.Muon`; AdamW beside it.

Sharded matrices (FSDP2, tensor parallelism) go to owners, each whole to one rank, and what becomes
of them back: two all-to-alls for all of them that the same ranks share, where torch's own way by
DTensor takes 11 to 16 collectives a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from psyche_fast.devices import multiplies_bf16
from psyche_fast.distro.chunks import ParameterLayout
from psyche_fast.distro.shards import Parts
from psyche_fast.methods.method import Muon
from psyche_fast.sharding import local_gradient, local_tensor


def is_hidden_matrix(options: Muon, name: str, tensor: Tensor) -> bool:
    """Whether a parameter is Muon's: a matrix, or several, that is no embedding or head."""
    is_matrix = tensor.dim() >= 2 and tensor.numel() > 0
    return is_matrix and not any(part in name for part in options.by_adamw)


def orthogonalise(options: Muon, matrices: Sequence[Tensor]) -> list[Tensor]:
    """What is left of matrices when all singular values become about 1.

    A quintic Newton-Schulz iteration in bfloat16, float64 for float64 matrices, of all matrices of
    one shape at once.

    Args:
        options: coefficients, steps and eps.
        matrices: `[.., R, C]` each.

    Returns:
        Tensors of the same shapes; bfloat16 or float64.
    """
    shapes: dict[tuple[Any, ...], list[int]] = {}
    for at, matrix in enumerate(matrices):
        kind = (*matrix.shape[-2:], _type_inside(matrix), matrix.device)
        shapes.setdefault(kind, []).append(at)
    found: dict[int, Tensor] = {}
    for (rows, columns, _, _), places in shapes.items():
        dtype = _type_inside(matrices[places[0]])
        stacked = torch.cat([matrices[at].reshape(-1, rows, columns).to(dtype) for at in places])
        result = _newton_schulz(options, stacked)
        sizes = [math.prod(matrices[at].shape[:-2]) for at in places]
        for at, part in zip(places, result.split(sizes), strict=True):
            found[at] = part.view(matrices[at].shape)
    return [found[at] for at in range(len(matrices))]


def _type_inside(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.bfloat16


def _newton_schulz(options: Muon, x: Tensor) -> Tensor:
    """Of matrices `[n, R, C]`.

    Where torch would emulate products of bfloat16, they are float32's of the same numbers, rounded
    as they would be: what differs is the order in which they are added up.
    """
    a, b, c = options.ns_coefficients
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=options.eps)
    dtype = x.dtype
    if dtype == torch.bfloat16 and not multiplies_bf16(x.device.type):
        x = x.float()

    def rounded(product: Tensor) -> Tensor:
        return product if product.dtype == dtype else product.copy_(product.to(dtype))

    for _ in range(options.ns_steps):
        gram = rounded(x @ x.mT)
        factor = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.baddbmm(x, factor, x, beta=a))
    x = x.to(dtype)
    return x.mT.contiguous() if is_tall else x


class Matrices:
    """Matrices of which this rank may hold shards, and their way to owners.

    The ranks that share matrices own as many of them each; of a tensor of more than two dimensions
    each matrix has an owner of its own. What no shard's edge cuts stays where it lies, and what all
    ranks hold whole each of them does.

    Args:
        tensors: `[.., R, C]` each, plain or DTensors. A collective of the ranks that share the
            latter; so is `orthogonalise`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._parts = Parts(
            tensors,
            [
                ParameterLayout.of(
                    str(at), t.shape, t.dtype, t.device,
                    compression_chunk=max(t.shape[-2:]), compression_topk=1,
                )
                for at, t in enumerate(tensors)
            ],
        )  # fmt: skip

    def orthogonalise(self, options: Muon, shards: Sequence[Tensor]) -> list[Tensor]:
        """See the function; of this rank's shards of tensors, one for each of the matrices'."""
        narrow = [s.to(_type_inside(s)) for s in shards]
        parts = self._parts.of(narrow)
        matrices = [
            part.reshape(-1, layout.h, layout.w)
            for part, layout in zip(parts, self._parts.layouts, strict=True)
        ]
        found = orthogonalise(options, matrices)
        return self._parts.shards(
            [own.reshape(part.shape) for own, part in zip(found, parts, strict=True)]
        )


def rate_factor(options: Muon, shape: Sequence[int]) -> float:
    """Factor on the learning rate for matrices of a shape."""
    rows, columns = shape[-2:]
    if options.adjust_lr_fn == "original":
        return math.sqrt(max(1, rows / columns))
    if options.adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon`'s step for hidden matrices and `torch.optim.AdamW`'s for all else.

    In one optimiser, for matrices of two and more dimensions (each of a batch by itself), all of
    one shape at once, float64 where parameters are. Sharded parameters (FSDP2, tensor parallelism)
    are taken as they are; their state is placed as they are, and a step is a collective.

    Args:
        named_parameters: (name, tensor) pairs; names tell hidden matrices. Plain or DTensors.
        lr: learning rate of both.
        options: all else.
        undecayed: names of parameters without weight decay.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        options: Muon = Muon(),  # noqa: B008
        undecayed: Container[str] = (),
    ) -> None:
        self.options = options
        self._matrices: dict[tuple[int, ...], Matrices] = {}
        hidden = 0.1 if options.weight_decay is None else options.weight_decay
        groups: dict[tuple[bool, float], list[tuple[str, Tensor]]] = {}
        for name, p in named_parameters:
            is_hidden = is_hidden_matrix(options, name, p)
            decay = hidden if is_hidden else options.adamw.weight_decay
            key = is_hidden, 0.0 if name in undecayed else decay
            groups.setdefault(key, []).append((name, p))
        super().__init__(
            [
                {"params": pairs, "weight_decay": decay, "use_muon": is_hidden}
                for (is_hidden, decay), pairs in groups.items()
            ],
            {"lr": lr},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss and the gradients anew, before the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["use_muon"] else self._adamw)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        options, lr = self.options, float(group["lr"])
        updates = []
        for p in parameters:
            gradient = local_gradient(p)
            assert gradient is not None
            buffer = local_tensor(self._state_of(p, "momentum_buffer"))
            buffer.lerp_(gradient, 1 - options.momentum)
            updates.append(gradient.lerp(buffer, options.momentum) if options.nesterov else buffer)
        key = tuple(map(id, parameters))
        if key not in self._matrices:
            self._matrices[key] = Matrices(parameters)
        directions = self._matrices[key].orthogonalise(options, updates)
        for p, direction in zip(parameters, directions, strict=True):
            own = local_tensor(p.detach())
            own.mul_(1 - lr * group["weight_decay"])
            own.add_(direction, alpha=-lr * rate_factor(options, p.shape))

    def _state_of(self, p: Tensor, name: str) -> Tensor:
        """A tensor of a parameter's state, placed as the parameter; zero at first."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p)
        return state[name]  # type: ignore[no-any-return]

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        options = self.options.adamw
        for p in parameters:
            self.state[p].setdefault("step", torch.tensor(0.0))
        first, second = (
            [local_tensor(self._state_of(p, name)) for p in parameters]
            for name in ("exp_avg", "exp_avg_sq")
        )
        adamw(
            [local_tensor(p.detach()) for p in parameters],
            [g for p in parameters if (g := local_gradient(p)) is not None],
            first,
            second,
            [],
            [self.state[p]["step"] for p in parameters],
            amsgrad=False,
            beta1=options.betas[0],
            beta2=options.betas[1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=options.eps,
            maximize=False,
        )
