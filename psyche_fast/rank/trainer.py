"""One rank's trainer: what a step does to model and optimiser, whoever asks for it.

Nothing in `train` waits for the device: what the host has to know of a batch it has counted before
the copy, and what only the device knows (losses, norms, whether they are finite) stays there until
the step's counts are read, during the step after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from psyche_fast import config
from psyche_fast.batch import Batch, upload
from psyche_fast.distro import replicas
from psyche_fast.distro.gathers import Gathers
from psyche_fast.models import CausalLM
from psyche_fast.rank.clock import Transfer
from psyche_fast.rank.gradients import (
    Fp32Accumulator,
    clip_factor,
    drop_gradients,
    global_norm,
    gradients,
    local_parts,
)
from psyche_fast.rank.link import Settled
from psyche_fast.rank.optimizers import Optimizer
from psyche_fast.rank.snapshot import Snapshot
from psyche_fast.rank.state import Piece, Reader, State, parameters_file, piece_of, rank_file
from psyche_fast.rank.topology import Topology
from psyche_fast.schedules import LearningRates
from psyche_fast.sharding import is_cut_over


@dataclass(frozen=True)
class TrainOutput:
    """What one `train` gave on this rank. Tensors lie on its device and are not waited for.

    Attributes:
        step: the step.
        row_tokens: real tokens of each of the replica's rows.
        loss: fp32 0-d. Averaged over the replica's ranks it is the mean loss per real token of the
            replica's rows, micro-batches whose loss was not finite counting as 0.
        kept: fp32 0-d; what `loss` would be if every loss that was finite had been 1.
        grad_norm: fp32 0-d, of the replica, before clipping.
        nonfinite_losses: int64 0-d, how many of the replica's micro-batches had a loss that was not
            finite on some rank.
        refused: bool 0-d; whether the replica's gradient was refused because it, or a loss of its
            own, was not finite.
        others: the same of further replicas that are in this process.
    """

    step: int
    row_tokens: list[int]
    loss: Tensor
    kept: Tensor
    grad_norm: Tensor
    nonfinite_losses: Tensor
    refused: Tensor
    others: Sequence[TrainOutput] = ()


class Trainer:
    """Trains one rank's model.

    Args:
        model: this rank's model.
        topology: this rank's place.
        schedule: learning rates.
        optimizer: over the model's `trainable` parameters.
        options: how the batch is gone through.
        max_grad_norm: clip the gradient's global norm; 0 for no limit.

    Attributes:
        settled: what has been chosen for the run's link; None where nothing was to be.
    """

    settled: Settled | None = None

    def __init__(
        self,
        model: CausalLM,
        topology: Topology,
        schedule: LearningRates,
        optimizer: Optimizer,
        options: config.Training,
        max_grad_norm: float,
    ) -> None:
        self.model = model
        self.topology = topology
        self.schedule = schedule
        self.parameters = trainable(model)
        self._clip = max_grad_norm or None
        self._optimizer = optimizer
        self._options = options
        # Autograd adds up in the parameters' own type: nothing to gain where that is fp32.
        wants = options.grad_accum_in_fp32 and any(
            p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters.values()
        )
        self._accumulator = Fp32Accumulator(self.parameters) if wants else None
        # Until the last micro-batch each rank holds the gradient of all of the replica's (or its
        # slice's) parameters, in fp32.
        self._defers = options.defer_grad_sync and isinstance(model.module, FSDPModule)
        self._checks: list[replicas.PendingCheck] = []
        self._snapshot: Snapshot | None = None
        self.stats: dict[str, Tensor] = {}
        """Norms of gradient and momentum per parameter, with `optim_stats`: 0-d, on the device."""
        self.virtual: dict[str, float] = {}
        """What the last step would have taken over a link that is simulated."""
        model.train()

    @property
    def bytes_sent(self) -> int:
        """Bytes of this rank's contribution to the last exchange."""
        return self._optimizer.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes that come from other replicas by that exchange."""
        return self._optimizer.bytes_received

    @property
    def refusals(self) -> dict[str, dict[str, int]]:
        """Of the results that the last step applied, by replica; only what there is.

        `refused_results` has 1 for each that was refused, `left_out_results` for how many further
        steps a replica's are left out unseen.
        """
        kinds = {
            "refused_results": self._optimizer.refused_results,
            "left_out_results": self._optimizer.left_out_results,
        }
        return {kind: {str(r): n for r, n in by.items()} for kind, by in kinds.items() if by}

    @property
    def senders(self) -> Future[list[int]] | None:
        """As of the optimiser."""
        return self._optimizer.senders

    @property
    def transfers(self) -> Sequence[Transfer]:
        """As of the optimiser."""
        return self._optimizer.transfers

    def parts(self) -> Iterator[Trainer]:
        """The trainers of the replicas that are in this process: this one."""
        yield self

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step`, 0 or more."""
        return self.schedule.get_lr(step)

    def train(self, step: int, batch: Batch) -> TrainOutput:
        """Look-ahead, forward and backward over all micro-batches, and DisTrO's result.

        Args:
            step: the step.
            batch: what this replica trains, the same on each of its ranks.

        Raises:
            ValueError: malformed sequence lengths or position ids.
        """
        prev_lr, lr = self.learning_rate(max(step - 1, 0)), self.learning_rate(step)
        batch = self.model.prepare(batch)  # checked before anything changes
        drop_gradients(self.parameters.values())
        self._optimizer.look_ahead(prev_lr)
        snapshot = self._begin_snapshot()
        losses, weights = self._forward_backward(batch)
        if self._accumulator is not None:
            norm = self._accumulator.finish()
        else:
            norm = global_norm(gradients(self.parameters.values()), self.model.device)
        finite = self._agree(losses.isfinite())
        # A loss that is not finite leaves nothing to be used of the gradients that it was added to.
        usable = norm.isfinite() & finite.all()
        if self._options.optim_stats:
            self.stats = self._statistics()
        factor = clip_factor(norm, self._clip).where(usable, torch.nan)
        if snapshot is not None:
            snapshot.wait()
            self._compare(snapshot.step, snapshot.hashes)
        self._optimizer.after_backward(prev_lr, lr, factor)
        return TrainOutput(
            step,
            batch.real_tokens(),
            losses.where(finite, 0.0).sum(),
            weights.where(finite, 0.0).sum(),
            norm,
            (~finite).sum(),
            ~usable,
        )

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses of this rank's micro-batches and what they weigh: fp32 `[micro-batches]`."""
        place = self.topology
        tokens = max(sum(batch.real_tokens()), 1)
        losses: list[Tensor] = []
        weights: list[float] = []
        micros = batch.micro_batches(self._options.micro_batch * place.dp)
        for number, micro in enumerate(micros, start=1):
            mine = micro.pad_rows(place.dp).share(place.shard, place.dp)
            # Every real token of the batch weighs the same, however the rows fall into
            # micro-batches; FSDP2 averages over its dp ranks, hence the factor.
            weight = place.dp * sum(mine.real_tokens()) / tokens
            self._optimizer.receive()
            loss = self.model.loss(mine) * weight
            # While the backward runs, the host may come to its end.
            self._optimizer.receive()
            last = number == len(micros)
            if self._defers:
                self.model.module.set_requires_gradient_sync(last)  # type: ignore[operator]
            loss.backward()
            losses.append(loss.detach().float())
            weights.append(weight)
            if self._accumulator is not None and (last or not self._defers):
                self._accumulator.add(last=last)
        return torch.stack(losses), upload(torch.tensor(weights), self.model.device)

    def _agree(self, finite: Tensor) -> Tensor:
        """Which micro-batches' losses are finite on all ranks of the replica; once per step."""
        if self.topology.copy is None:
            return finite
        flags = finite.float()
        dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.topology.copy)
        return flags > 0

    def optimize(self, step: int) -> None:
        """The optimiser's step.

        Raises:
            ValueError: a result is malformed.
            ReplicasDiffer: the replicas' parameters were no longer bit-identical when they were
                looked at last, one of these calls ago.
        """
        for _ in self.stages(step):
            pass

    def stages(self, step: int) -> Iterator[None]:
        """`optimize` in parts, at whose ends the other replicas have to be as far."""
        yield from self._optimizer.stages(self.learning_rate(step))
        self.finish_check()
        if self._snapshot is not None:
            snapshot, self._snapshot = self._snapshot, None
            snapshot.hand_over(rank_file(self._rank()), self._prefixed(self._optimizer.arrived()))
        if self._options.check_every and step % self._options.check_every == 0:
            self.begin_check(step)

    def plain(self) -> None:
        """Makes the model's parameters the plain ones, for forward, extract and checkpoints.

        Results that are under way between ranks have arrived then.

        Between steps DisTrO leaves them in the look-ahead for the next one.
        """
        self._optimizer.plain()
        self._optimizer.settle()

    def parameter_state(self) -> dict[str, Piece]:
        """This rank's part of all parameters, masters and buffers, after `plain`; not copies."""
        return {name: piece_of(tensor) for name, tensor in self.model.kept().items()}

    def state(self) -> dict[str, Piece]:
        """What this rank alone has, after `plain`: the optimiser's state and random numbers'."""
        optimizer = self._prefixed({**self._optimizer.state(), **self._optimizer.arrived()})
        return {**optimizer, **self._random_numbers()}

    def files(self) -> dict[str, State]:
        """What this rank writes of a checkpoint by file, after `plain`; not copies."""
        rank = self._rank()
        files: dict[str, State] = {rank_file(rank): self.state()}
        if self.topology.replica == 0:
            files[parameters_file(rank)] = self.parameter_state()
        return files

    def take_snapshot(
        self, step: int, then: Callable[[dict[str, State] | Exception], None]
    ) -> None:
        """Has `files` copied, as they are now, during the next step; all ranks call it alike.

        Replicas are compared as by `check_replicas`, which the next `optimize` tells of.

        Args:
            step: the step that has been trained.
            then: called at the end of the next `optimize` with the copies by file, or with what
                has kept them from being made.
        """
        rank = self._rank()
        early = {rank_file(rank): self._random_numbers()}  # what the next forward changes
        if self.topology.replica == 0:
            buffers = {n: p for n, p in self.parameter_state().items() if n.startswith("buffer/")}
            early[parameters_file(rank)] = {n: p.on_host(copy=True) for n, p in buffers.items()}
        self._snapshot = Snapshot(step, then, early)

    def drop_snapshot(self) -> bool:
        """Forgets one that was to be taken in the next step; whether there was one."""
        wanted, self._snapshot = self._snapshot is not None, None
        return wanted

    def _begin_snapshot(self) -> Snapshot | None:
        """In the look-ahead; all ranks take part."""
        snapshot, rank = self._snapshot, self._rank()
        if snapshot is None:
            return None
        plain = self._optimizer.plain_shards()
        files: dict[str, State] = {rank_file(rank): self._prefixed(self._optimizer.state())}
        if self.topology.replica == 0:
            files[parameters_file(rank)] = {
                name: piece
                if (tensor := plain.get(name.partition("/")[2])) is None
                else replace(piece, tensor=tensor, dtype=piece.tensor.dtype)
                for name, piece in self.parameter_state().items()
                if not name.startswith("buffer/")
            }
        self._optimizer.keep_arrived()
        hashed = [list(parts.values()) for _, parts, _ in self._comparisons(plain)]
        snapshot.begin(files, hashed if self._options.check_every else [], self.model.device)
        return snapshot

    def _rank(self) -> int:
        return self.topology.rank

    def _random_numbers(self) -> dict[str, Piece]:
        numbers = {"random/cpu": Piece(torch.get_rng_state())}
        if self.model.device.type == "cuda":
            numbers["random/cuda"] = Piece(torch.cuda.get_rng_state(self.model.device))
        return numbers

    @staticmethod
    def _prefixed(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        return {f"optimizer/{name}": piece for name, piece in pieces.items()}

    @torch.no_grad()
    def load(self, parameters: Reader, own: Reader | None, *, is_new: bool = False) -> None:
        """Takes up what `parameter_state` and `state` gave, before the first step.

        Args:
            parameters: has the former.
            own: has the latter; None for the parameters alone.
            is_new: this rank is of a replica that was not there.

        Raises:
            ValueError: they are another model's or optimiser's.
        """
        parameters.fill(self.parameter_state())
        if own is None:
            return
        self._optimizer.load(own, is_new=is_new)
        torch.set_rng_state(own.tensor("random/cpu"))
        if self.model.device.type == "cuda" and "random/cuda" in own.names():
            torch.cuda.set_rng_state(own.tensor("random/cuda"), self.model.device)

    def zero(self) -> None:
        """Forgets the optimiser's momentum."""
        self._optimizer.zero_momentum()

    def check_replicas(self, step: int) -> None:
        """Compares the parameters' bits with the other replicas', where there are any.

        Those that tensor-parallel ranks hold whole are compared among them too.

        Raises:
            ReplicasDiffer: they are not the same.
        """
        self.finish_check()
        self.begin_check(step)
        self.finish_check()

    def begin_check(self, step: int) -> None:
        """Begins to compare, unless that is off; `finish_check` tells what has come of it."""
        place = self.topology
        if not self._options.check_every or (place.peers is None and place.tensor_mesh is None):
            return
        self._optimizer.plain()
        for group, parts, who in self._comparisons({}):
            self._checks.append(replicas.start(parts, group, step, who))

    def _compare(self, step: int, hashes: list[Tensor]) -> None:
        """Starts the checks of a snapshot's hashes, one for each of `_comparisons`."""
        compared = self._comparisons({}) if hashes else []
        for (group, parts, who), own in zip(compared, hashes, strict=True):
            self._checks.append(replicas.start(parts, group, step, who, hashes=own))

    def _comparisons(
        self, plain: Mapping[str, Tensor]
    ) -> list[tuple[dist.ProcessGroup | Gathers, dict[str, Tensor], str]]:
        """What this rank has alike with others: the ranks, its parts, and who they are.

        Args:
            plain: this rank's parts of those parameters that are not plain.
        """
        kept = {**self.parameters, **self.model.masters}  # what decides what they become
        place, parts = self.topology, {**local_parts(kept), **plain}
        found: list[tuple[dist.ProcessGroup | Gathers, dict[str, Tensor], str]] = []
        if place.peers is not None:
            found.append((place.peers, parts, "replicas"))
        if place.tensor_mesh is not None:
            group = place.tensor_mesh.get_group()
            whole = {n: parts[n] for n, p in kept.items() if not is_cut_over(p, group)}
            found.append((group, whole, "tensor-parallel ranks"))
        return found

    def finish_check(self) -> None:
        """Waits for the comparisons that have been begun.

        Raises:
            ReplicasDiffer: see `check_replicas`.
        """
        checks, self._checks = self._checks, []
        for check in checks:
            check.finish()

    def _statistics(self) -> dict[str, Tensor]:
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        kinds = (("grad_norm", grads), ("momentum_norm", self._optimizer.momentum()))
        return {
            f"{kind}/{name}": global_norm([tensor], self.model.device)
            for kind, tensors in kinds
            for name, tensor in tensors.items()
        }


def trainable(model: CausalLM) -> dict[str, Tensor]:
    """The parameters that are trained, in name order."""
    return {n: p for n, p in model.named_parameters().items() if p.requires_grad}
