"""The reference DeMo's formulation, every operation done parameter by parameter."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

CHUNK = 64
DECAY = 0.999


class PlainDeMo:
    """What the reference does for each parameter (arXiv 2411.19870, `demo.py`), for one peer.

    In a process group it gathers its results as the reference does, one tensor at a time.
    """

    def __init__(self, parameters: list[torch.Tensor], lr: float, topk: int) -> None:
        self.parameters, self.lr, self.topk = parameters, lr, topk
        self.delta = [torch.zeros_like(p) for p in parameters]
        self.basis: dict[int, torch.Tensor] = {}
        for p in parameters:
            for n in p.shape:
                self.basis.setdefault(side(n), dct(side(n)).to(p))

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for p, delta in zip(self.parameters, self.delta, strict=True):
            assert p.grad is not None
            delta.mul_(DECAY).add_(p.grad, alpha=self.lr)
            index, value, shape = self.compress(self.encode(delta))
            delta.sub_(self.decode(self.scatter(index, value, shape)).view_as(delta))
            # What the all-gather of one peer returns, decoded like any number of peers.
            indices, values = torch.cat(gathered(index), -1), torch.cat(gathered(value), -1)
            update = self.decode(self.scatter(indices, values, shape)).view_as(p)
            # The reference writes the signs over the gradient; here that stays for the next step.
            p.sub_(update.sign_(), alpha=self.lr)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients of one parameter."""
        w = side(x.shape[-1])
        if x.dim() == 1:
            return torch.einsum("xw,wd->xd", x.view(-1, w), self.basis[w])
        h = side(x.shape[0])
        cut = x.view(x.shape[0] // h, h, x.shape[1] // w, w)
        return torch.einsum("yhxw,hb,wd->yxbd", cut, self.basis[h], self.basis[w])

    def decode(self, c: torch.Tensor) -> torch.Tensor:
        """Back from coefficients."""
        if c.dim() == 2:
            return torch.einsum("xd,wd->xw", c, self.basis[c.shape[-1]])
        h, w = c.shape[-2:]
        return torch.einsum("yxbd,hb,wd->yhxw", c, self.basis[h], self.basis[w]).contiguous()

    def compress(self, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
        """Indices, values and encoded shape of the largest coefficients."""
        flat = c.flatten(2) if c.dim() > 2 else c
        k = min(self.topk, flat.shape[-1])
        index = torch.topk(flat.abs(), k, dim=-1, sorted=False).indices
        return index, flat.gather(-1, index), c.shape

    @staticmethod
    def scatter(index: torch.Tensor, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Dense coefficients, each the mean of its entries."""
        flat = value.new_zeros(shape)
        flat = flat.flatten(2) if len(shape) > 2 else flat
        flat.scatter_reduce_(-1, index, value, reduce="mean", include_self=False)
        return flat.view(shape)


def gathered(x: torch.Tensor) -> list[torch.Tensor]:
    """Every peer's tensor; only this one where there is no process group."""
    if not dist.is_initialized():
        return [x]
    parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts


def side(n: int) -> int:
    """The largest divisor of a dimension that is at most `CHUNK`."""
    return next(s for s in range(min(n, CHUNK), 0, -1) if n % s == 0)


def dct(n: int) -> torch.Tensor:
    """Basis of the orthonormal DCT-II, float64 `[n, n]`, one column per coefficient."""
    j = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * j[:, None] + 1) * j / (2 * n)) * math.sqrt(2 / n)
    basis[:, 0] /= math.sqrt(2)
    return basis
