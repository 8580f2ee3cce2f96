"""A replica's parameters in a method: the model's, those that steps change, the shared ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast.methods.method import Method
from psyche_fast.methods.steps import copied
from psyche_fast.sharding import cuts, local_tensor, part_of, placed_like


class Copies:
    """Up to three tensors for each parameter, which may be one and the same.

    All are placed as the parameter, of which this rank may have a shard.

    Args:
        method: whose.
        parameters: the model's, by name.
        masters: float32 copies of those of narrower types, which are what they round to.

    Attributes:
        parameters: those of the forward, in the order of names.
        stepped: what local steps are added to: masters where there are, else the parameters.
        shared: what all replicas have alike: what is stepped itself where replicas do not differ
            from it, else a copy; float32 or float64.

    Raises:
        TypeError: a parameter is not of floating point.
        ValueError: no parameters, or some that the method does not take.
    """

    def __init__(
        self,
        method: Method,
        parameters: Mapping[str, Tensor],
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._method = method
        self.parameters = dict(sorted(parameters.items()))
        self.stepped = {n: (masters or {}).get(n, p) for n, p in self.parameters.items()}
        _check(method, self.stepped)
        self.shared = {name: self._shared_of(name) for name in self.parameters}
        # What parameters are rounded from: those that are not this themselves.
        source = self.stepped if method.is_local else self.shared
        self._wide = {
            name: source[name]
            for name, p in self.parameters.items()
            if not method.lookahead
            and (self.stepped[name] is not p or source[name].dtype != p.dtype)
        }
        self._aside: dict[str, Tensor] | None = None  # what is stepped, where the shared are now

    def _shared_of(self, name: str) -> Tensor:
        stepped, parameter = self.stepped[name], self.parameters[name]
        is_another = self._method.is_local or (self._method.lookahead and stepped is parameter)
        if not is_another and stepped.dtype == _wide(stepped):
            return stepped if isinstance(stepped, DTensor) else stepped.detach()
        copy = local_tensor(stepped.detach()).to(_wide(stepped), copy=True)
        return placed_like(copy, stepped) if isinstance(stepped, DTensor) else copy

    def round(self, names: Iterable[str] | None = None) -> None:
        """Bring parameters, all or some, up to date with what they are rounded from."""
        for name in self._wide if names is None else names:
            if name in self._wide:
                (parameter,), (wide,) = (parts(t, [name]) for t in (self.parameters, self._wide))
                parameter.copy_(wide)

    @torch.no_grad()
    def put_shared(self) -> None:
        """Give the model, masters included, what all replicas share."""
        if self._method.is_local and self._aside is None:
            own = parts(self.stepped)
            self._aside = {n: t.clone() for n, t in zip(self.stepped, own, strict=True)}
            torch._foreach_copy_(own, parts(self.shared))
            self.round()
        elif self._method.lookahead:
            torch._foreach_copy_(parts(self.parameters), parts(self.shared))

    @torch.no_grad()
    def put_own(self) -> None:
        """Undo `put_shared` between local steps."""
        if self._aside is not None:
            torch._foreach_copy_(parts(self.stepped), list(self._aside.values()))
            self._aside = None
            self.round()

    def state(self) -> dict[str, Any]:
        """Copies of this rank's parts of what is shared and, if it is another, of its own."""
        own = self.stepped if self._aside is None else self._aside
        return {
            "place": self._place(),
            "shared": copied(self.shared),
            "local": copied(own) if self._method.is_local else {},
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave.

        Raises:
            ValueError: it is of another model, or of another place among a replica's ranks; nothing
                has been changed then.
        """
        self._check_place(state.get("place", {}))
        kinds = {"shared": self.shared}
        if self._method.is_local:
            kinds["local"] = self.stepped
        pairs = []
        for kind, tensors in kinds.items():
            saved = state[kind]
            for name in sorted(set(saved) ^ set(tensors)):
                raise ValueError(f"parameter {name} is in the saved state or the model alone")
            for name, own in zip(tensors, parts(tensors), strict=True):
                if saved[name].shape != own.shape:
                    raise ValueError(
                        f"parameter {name}: saved {list(saved[name].shape)}, here {list(own.shape)}"
                    )
                pairs.append((own, saved[name]))
        for own, saved in pairs:
            own.copy_(saved)
        self._aside = None
        self.round()
        if self._method.lookahead:
            self.put_shared()

    def _place(self) -> dict[str, list[list[int]]]:
        """Where this rank's part of each distributed parameter begins and ends, by dimension."""
        return {
            name: [[r.start, r.stop] for r in part_of(p)]
            for name, p in self.parameters.items()
            if isinstance(p, DTensor)
        }

    def _check_place(self, saved: Mapping[str, Any]) -> None:
        here = self._place()
        for name in sorted(set(saved) | set(here)):
            then, now = saved.get(name, "whole"), here.get(name, "whole")
            if then != now:
                raise ValueError(
                    f"parameter {name}: this rank has {now} of it and had {then} where the state "
                    "was saved, which is of as many ranks, sharded alike"
                )


def parts(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> list[Tensor]:
    """This rank's parts of some tensors or all, to be changed in place.

    They are asked for anew each time: FSDP2 moves them at the first forward.
    """
    return [local_tensor(tensors[n].detach()) for n in (tensors if names is None else names)]


def _check(method: Method, stepped: Mapping[str, Tensor]) -> None:
    if not stepped:
        raise ValueError("parameters: wanted some, got none")
    for name, p in stepped.items():
        if not p.is_floating_point():
            raise TypeError(f"parameter {name} must be floating point, got {p.dtype}")
        if method.values == "codebook4" and isinstance(p, DTensor) and cuts(p):
            raise ValueError(
                f"parameter {name} is sharded, and a codebook (values='codebook4') is of all of a "
                "parameter's values, of which each rank has a part; '2bit' has levels per chunk"
            )
        if method.is_local and p.dtype != _wide(p):
            raise ValueError(
                f"parameter {name} is {p.dtype}: local steps are lost to its rounding; wanted "
                "float32, with mixed precision for the forward"
            )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
