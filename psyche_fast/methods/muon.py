"""Muon: orthogonalised momentum for hidden matrices, as `torch.optim.Muon`; AdamW beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from psyche_fast.methods.method import Muon


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
        kind = (*matrix.shape[-2:], matrix.dtype == torch.float64, matrix.device)
        shapes.setdefault(kind, []).append(at)
    found: dict[int, Tensor] = {}
    for (rows, columns, is_double, _), places in shapes.items():
        dtype = torch.float64 if is_double else torch.bfloat16
        stacked = torch.cat([matrices[at].reshape(-1, rows, columns).to(dtype) for at in places])
        result = _newton_schulz(options, stacked)
        sizes = [math.prod(matrices[at].shape[:-2]) for at in places]
        for at, part in zip(places, result.split(sizes), strict=True):
            found[at] = part.view(matrices[at].shape)
    return [found[at] for at in range(len(matrices))]


def _newton_schulz(options: Muon, x: Tensor) -> Tensor:
    """Of matrices `[n, R, C]`."""
    a, b, c = options.ns_coefficients
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=options.eps)
    for _ in range(options.ns_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if is_tall else x


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
    one shape at once, float64 where parameters are.

    Args:
        named_parameters: (name, tensor) pairs; names tell hidden matrices.
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
            assert p.grad is not None
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - options.momentum)
            updates.append(p.grad.lerp(buffer, options.momentum) if options.nesterov else buffer)
        for p, update in zip(parameters, orthogonalise(options, updates), strict=True):
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update, alpha=-lr * rate_factor(options, p.shape))

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        options = self.options.adamw
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.tensor(0.0)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=options.betas[0],
            beta2=options.betas[1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=options.eps,
            maximize=False,
        )
