"""The optimisers behind one face, in the order of Psyche's train loop.

`Trainer.train` calls `look_ahead`, `receive` and `after_backward`; `Trainer.optimize` calls `step`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from psyche_fast import config
from psyche_fast.distro import DistroStep
from psyche_fast.distro.elastic import ElasticExchange
from psyche_fast.distro.exchange import Exchange
from psyche_fast.distro.gathers import Gathers
from psyche_fast.distro.message import MessageFormat
from psyche_fast.distro.state import (
    by_name,
    chunk_counts,
    chunk_numbers,
    entries_by_name,
    entries_of,
)
from psyche_fast.kernels.plan import Entries
from psyche_fast.rank.clock import Transfer
from psyche_fast.rank.gradients import gradients, scale_
from psyche_fast.rank.state import Piece, Reader, piece_of
from psyche_fast.sharding import local_tensor

_STEPPED_ELEMENTS = 1 << 25
"""Elements whose gradients are widened at once for masters (128 MiB), or those of one parameter."""


class Optimizer:
    """One rank's optimiser over named parameters. This one changes nothing."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of this rank's contribution to the last exchange."""
        return 0

    @property
    def bytes_received(self) -> int:
        """Bytes that come from other replicas by that exchange."""
        return 0

    @property
    def refused_results(self) -> dict[int, int]:
        """Replicas whose results were refused in the last `step`, each with 1."""
        return {}

    @property
    def left_out_results(self) -> dict[int, int]:
        """Replicas whose results are left out unseen, each with for how many steps yet."""
        return {}

    @property
    def senders(self) -> Future[list[int]] | None:
        """The replicas whose results of the last step count; None where it is all, always."""
        return None

    @property
    def transfers(self) -> Sequence[Transfer]:
        """What the last step has sent to other replicas, for a virtual clock."""
        return ()

    def look_ahead(self, prev_lr: float) -> None:
        """Bring the parameters to where the gradient is wanted."""

    def receive(self) -> None:
        """Begin with what has come from other ranks; waits for nothing, changes no parameter.

        To be called between forwards and backwards, as often as one likes.
        """

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Take up the gradients.

        Args:
            prev_lr: learning rate of the previous step.
            lr: learning rate of this step.
            factor: what to multiply the gradients by (clipping), 0-d on their device. NaN where
                the gradients are not to be used at all.
        """

    def step(self, lr: float) -> None:
        """Change the parameters.

        Args:
            lr: learning rate of this step.
        """

    def stages(self, lr: float) -> Iterator[None]:
        """`step` in parts, after each of which other replicas have to be as far."""
        self.step(lr)
        yield

    def settle(self) -> None:
        """Wait until nothing is under way between ranks: before checkpoints and at the end."""

    def plain(self) -> None:
        """Make the parameters what a checkpoint wants: without look-ahead, with weight decay."""

    def zero_momentum(self) -> None:
        """Forget the momentum where the optimiser can."""

    def momentum(self) -> Mapping[str, Tensor]:
        """The momentum by parameter name, for statistics."""
        return {}

    def plain_shards(self) -> Mapping[str, Tensor]:
        """Between `look_ahead` and `after_backward`: this rank's parts of the plain parameters.

        By name, those alone that the parameters themselves are not; or of their masters, where
        these are wider. A collective of the replica's ranks.
        """
        return {}

    def state(self) -> dict[str, Piece]:
        """What this rank has beside the parameters, but for `arrived`; not copies.

        It does not change until `after_backward`.
        """
        return {}

    def keep_arrived(self) -> None:
        """Have what the next `step` takes up from other ranks stay, once, for `arrived`."""

    def arrived(self) -> dict[str, Piece]:
        """The rest of `state`: what has come from other ranks.

        After `settle` what the next step takes up; after `keep_arrived` and a step what that one
        has, which changes no more.
        """
        return {}

    def load(self, reader: Reader, *, is_new: bool) -> None:
        """Take up what `state` gave, wherever it was; this optimiser has not made a step yet.

        Args:
            reader: has it, each name after `optimizer/`.
            is_new: of a replica that was not there; it takes up what all replicas have alike.

        Raises:
            ValueError: it is another optimiser's.
        """


class AdamWOptimizer(Optimizer):
    """`torch.optim.AdamW`, fused, on the master copies where there are any.

    Moments have the type of what the step is added to: with masters a bf16 parameter takes 16
    bytes, of them 2 the gradient, which is widened for `_STEPPED_ELEMENTS` at a time.

    Args:
        parameters: by name.
        options: the run's.
        masters: fp32 copies of parameters of narrower types by name, placed as these are.
        undecayed: names of the parameters without weight decay.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        options: config.Optimizer,
        masters: Mapping[str, Tensor] | None = None,
        undecayed: Container[str] = (),
    ) -> None:
        masters = masters or {}
        self._names = list(parameters)
        self._parts: list[_Part] = []
        for names in _parts(parameters, masters):
            pairs = [(parameters[n], masters.get(n, parameters[n])) for n in names]
            groups: dict[float, list[Tensor]] = {}
            for name, (_, stepped) in zip(names, pairs, strict=True):
                decay = 0.0 if name in undecayed else options.weight_decay
                groups.setdefault(decay, []).append(stepped)
            adamw = torch.optim.AdamW(
                [{"params": ps, "weight_decay": decay} for decay, ps in groups.items()],
                betas=(options.beta1, options.beta2),
                eps=options.eps,
                fused=True,
            )
            self._parts.append(_Part(names, pairs, adamw))
        self._factor: Tensor | None = None

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Keep the factor for `step`."""
        self._factor = factor

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Clip and take AdamW's step; what is to be refused changes nothing, by the device."""
        assert self._factor is not None, "`after_backward` comes first"
        # What mixed precision's loss scaler says of gradients that overflowed: the fused kernel
        # then changes neither parameters nor moments.
        refused = (~self._factor.isfinite()).float()
        for part in self._parts:
            part.adamw.found_inf = refused  # type: ignore[attr-defined]
            for group in part.adamw.param_groups:
                group["lr"] = lr
            for parameter, stepped in part.pairs:
                if parameter.grad is not None and stepped is not parameter:
                    stepped.grad = parameter.grad.to(stepped.dtype)
                    parameter.grad = None
            scale_(gradients(stepped for _, stepped in part.pairs), self._factor)
            for _, stepped in part.pairs:
                # fused AdamW takes gradients of the parameters' own type only
                if stepped.grad is not None and stepped.grad.dtype != stepped.dtype:
                    stepped.grad = stepped.grad.to(stepped.dtype)
            part.adamw.step()
            part.adamw.zero_grad(set_to_none=True)
            copies = [(p, stepped) for p, stepped in part.pairs if stepped is not p]
            if copies:
                torch._foreach_copy_(
                    [local_tensor(p.detach()) for p, _ in copies],
                    [local_tensor(stepped) for _, stepped in copies],
                )

    def zero_momentum(self) -> None:
        """Forget both moments and the step count."""
        for part in self._parts:
            part.adamw.state.clear()

    def momentum(self) -> Mapping[str, Tensor]:
        """AdamW's first moment."""
        moments = {
            name: part.adamw.state[stepped]["exp_avg"]
            for part in self._parts
            for name, (_, stepped) in zip(part.names, part.pairs, strict=True)
            if stepped in part.adamw.state
        }
        return {name: moments[name] for name in self._names if name in moments}

    def state(self) -> dict[str, Piece]:
        """`NAME/exp_avg`, `NAME/exp_avg_sq` and `NAME/step` of parameters that were stepped."""
        return {
            f"{name}/{key}": piece_of(value)
            for part in self._parts
            for name, (_, stepped) in zip(part.names, part.pairs, strict=True)
            for key, value in part.adamw.state.get(stepped, {}).items()
        }

    @torch.no_grad()
    def load(self, reader: Reader, *, is_new: bool) -> None:
        """Take up what `state` gave."""
        names = reader.names()
        for part in self._parts:
            for name, (_, tensor) in zip(part.names, part.pairs, strict=True):
                kept = f"optimizer/{name}/"
                if f"{kept}step" not in names:
                    continue
                moments = {k: torch.zeros_like(tensor.detach()) for k in ("exp_avg", "exp_avg_sq")}
                reader.fill({kept + key: piece_of(m) for key, m in moments.items()})
                step = reader.tensor(f"{kept}step").to(tensor.device)
                part.adamw.state[tensor] = {"step": step, **moments}


@dataclass(frozen=True)
class _Part:
    """Parameters that AdamW steps at once: themselves and what is stepped in their stead."""

    names: list[str]
    pairs: list[tuple[Tensor, Tensor]]
    adamw: torch.optim.AdamW


def _parts(parameters: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of parameters that are stepped at once."""
    parts: list[list[str]] = []
    # By mesh: torch's fused and foreach paths refuse a mixture of plain tensors and DTensors, or
    # of DTensors of two meshes.
    filling: dict[object, tuple[list[str], int]] = {}
    for name, parameter in parameters.items():
        key = parameter.device_mesh if isinstance(parameter, DTensor) else None
        size = local_tensor(parameter.detach()).numel() if name in masters else 0
        names, held = filling.get(key, ([], 0))
        if not names or held + size > _STEPPED_ELEMENTS:
            names, held = [], 0
            parts.append(names)
        names.append(name)
        filling[key] = names, held + size
    return parts


class DistroOptimizer(DistroStep, Optimizer):
    """DisTrO: replicas exchange their results among themselves and apply them one step late."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        options: config.Optimizer,
        peers: dist.ProcessGroup | Gathers | None,
        masters: Mapping[str, Tensor] | None = None,
        undecayed: Container[str] = (),
    ) -> None:
        """Take the parameters by name; a collective of all ranks where there is a group of peers.

        Args:
            parameters: by name.
            options: the run's.
            peers: this rank's counterparts in the other replicas.
            masters: fp32 copies of parameters of narrower types by name.
            undecayed: names of the parameters without weight decay.
        """
        super().__init__(
            parameters,
            masters=masters,
            master_dtype=torch.float32 if masters else torch.bfloat16,
            undecayed=undecayed,
            **distro_options(options),
        )
        form = MessageFormat(
            self.layout,
            self.backends,
            signs=options.distro_quantization,
            outliers=options.refuse_outliers,
        )
        self._replicas = 1
        if isinstance(peers, Gathers):
            self._exchange: Exchange = ElasticExchange(form, peers)
            self._replicas = peers.replicas
        else:
            # All ranks, not the peers alone: what tensor parallelism replicates is every rank's.
            agreement = None if peers is None else dist.new_group(backend="gloo")
            assert agreement is None or isinstance(agreement, dist.ProcessGroup)
            self._exchange = Exchange(form, peers, agreement)
        self._own: list[Entries] | None = None
        self._keeps = False
        self._taken: tuple[list[Entries] | None] | None = None
        self._chunks: tuple[dict[str, Tensor], dict[str, int]] | None = None

    @property
    def bytes_sent(self) -> int:
        """Size of this rank's last message."""
        return self._exchange.bytes_sent

    @property
    def bytes_received(self) -> int:
        """See `Optimizer`; in an elastic run of the results that have come last."""
        return self._exchange.bytes_received

    @property
    def transfers(self) -> Sequence[Transfer]:
        """See `Optimizer`."""
        sent = self._exchange.bytes_sent
        return [Transfer(sent, sent * (self._replicas - 1), delay=1)]

    @property
    def refused_results(self) -> dict[int, int]:
        """See `Optimizer`."""
        return self._exchange.refused

    @property
    def left_out_results(self) -> dict[int, int]:
        """See `Optimizer`."""
        return self._exchange.left_out

    @property
    def senders(self) -> Future[list[int]] | None:
        """See `Optimizer`; of an elastic run."""
        return self._exchange.senders if isinstance(self._exchange, ElasticExchange) else None

    def receive(self) -> None:
        """Begin to unpack the previous step's results as soon as they have arrived.

        Then they are checked long before `step` asks, and on a GPU the host launches what follows
        the backward while that still runs. When it happens depends on the link, what comes of it
        does not.
        """
        self._exchange.poll()

    def after_backward(self, prev_lr: float, lr: float, factor: Tensor) -> None:
        """Compress, and send what comes of it on its way."""
        self.receive()  # the last moment at which the device still has something to do
        self._own = self.compress(self._own, lr, grad_scale=factor)
        self._exchange.send(self._own)

    def step(self, lr: float) -> None:
        """Apply the previous step's results of all replicas; after the very first there are none.

        What any rank refuses is left out by all, with a warning that names the sender.
        """
        if len(self._exchange) < 2:
            return
        entries = self._exchange.receive()
        if self._keeps:
            self._taken, self._keeps = (entries,), False
        if entries is not None:
            self.update(entries, lr)

    def settle(self) -> None:
        """Wait for results under way."""
        self._exchange.settle()

    def state(self) -> dict[str, Piece]:
        """Delta and own entries by chunks, and whether there are results of a step to apply."""
        state = {f"delta/{n}": d for n, d in by_name(self, self.plan_deltas()).items()}
        if self._own is not None:
            state |= entries_by_name(self, self._own, "own")
        under_way = torch.tensor(len(self._exchange))
        pieces = {name: self._piece(name, tensor) for name, tensor in state.items()}
        return {
            **pieces,
            "refused": Piece(self.refused),
            "under_way": Piece(under_way),
            "exchanges": Piece(torch.tensor(self._exchange.number)),
            "standing": Piece(self._exchange.standing.state()),
        }

    def keep_arrived(self) -> None:
        """See `arrived`."""
        self._keeps = True

    def arrived(self) -> dict[str, Piece]:
        """The results that the next step applies, or has applied after `keep_arrived`."""
        if self._taken is None:
            entries = self._exchange.arrived()
        else:
            (entries,), self._taken = self._taken, None
        named = {} if entries is None else entries_by_name(self, entries, "arrived")
        return {name: self._piece(name, tensor) for name, tensor in named.items()}

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        """A part by the chunks of the parameter that `KIND/NAME` or `KIND/NAME/...` is of."""
        if self._chunks is None:
            self._chunks = chunk_numbers(self), chunk_counts(self)
        kind, _, parameter = name.partition("/")
        if kind != "delta":
            parameter = parameter.rpartition("/")[0]
        numbers, counts = self._chunks
        return Piece(tensor, whole=(counts[parameter],), rows=numbers[parameter])

    @torch.no_grad()
    def load(self, reader: Reader, *, is_new: bool) -> None:
        """Take up what `state` gave."""
        names = {n.removeprefix("optimizer/") for n in reader.names()}
        if not is_new:
            state = {f"delta/{n}": d for n, d in by_name(self, self.plan_deltas()).items()}
            pieces = {f"optimizer/{n}": self._piece(n, d) for n, d in state.items()}
            reader.fill({**pieces, "optimizer/refused": Piece(self.refused)})
            if any(name.startswith("own/") for name in names):
                self._own = self._read_entries(reader, "own")
        if "exchanges" in names:  # earlier versions knew neither
            self._exchange.number = int(reader.tensor("optimizer/exchanges"))
            self._exchange.standing.load(reader.tensor("optimizer/standing"))
        if int(reader.tensor("optimizer/under_way")):
            there = any(name.startswith("arrived/") for name in names)
            self._exchange.load(self._read_entries(reader, "arrived") if there else None)

    def _read_entries(self, reader: Reader, kind: str) -> list[Entries]:
        state = {}
        for parameter, rows in chunk_numbers(self).items():
            for what in ("indices", "values"):
                name = f"{kind}/{parameter}/{what}"
                first = reader.tensor(f"optimizer/{name}")  # of other chunks, as wide
                like = first.new_empty(len(rows), *first.shape[1:])
                state[name] = reader.read(f"optimizer/{name}", self._piece(name, like))
        return entries_of(self, state, kind)

    def zero_momentum(self) -> None:
        """Zero delta; what was in it is no longer to be subtracted from it."""
        super().zero_momentum()
        self._own = None


def distro_options(options: config.Optimizer) -> dict[str, Any]:
    """What `DistroStep` takes of a run's options."""
    return {
        "compression_decay": options.compression_decay,
        "compression_chunk": options.compression_chunk,
        "compression_topk": options.compression_topk,
        "weight_decay": options.weight_decay,
        "delta_dtype": getattr(torch, options.delta_dtype),
        "offload_delta": options.offload_delta,
    }


def make_optimizer(
    options: config.Optimizer,
    parameters: Mapping[str, Tensor],
    peers: dist.ProcessGroup | Gathers | None,
    masters: Mapping[str, Tensor] | None = None,
    undecayed: Container[str] = (),
) -> Optimizer:
    """The optimiser that the options name; a collective of all ranks where there are peers.

    Args:
        options: the run's.
        parameters: by name.
        peers: this rank's counterparts in the other replicas; None for one replica.
        masters: fp32 copies of parameters of narrower types by name, to which steps are added.
        undecayed: names of the parameters without weight decay.
    """
    if options.distro:
        return DistroOptimizer(parameters, options, peers, masters, undecayed)
    return AdamWOptimizer(parameters, options, masters, undecayed)
