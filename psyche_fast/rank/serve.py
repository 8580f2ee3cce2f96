"""What the core and the sidecars do alike on the way to a trainer."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.source import ModelSource, read_config
from psyche_fast.psyche import evaluation, messages
from psyche_fast.psyche.messages import Hyperparameters, Settings
from psyche_fast.psyche.store import SidecarStore, barrier
from psyche_fast.psyche.tensors import receive_batch, receive_results, unpack_batch
from psyche_fast.rank.topology import Topology, set_timeout
from psyche_fast.rank.trainer import Trainer, TrainOutput

log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def join(
    backend: str,
    store: dist.Store,
    world_size: int,
    rank: int,
    device: torch.device,
    timeout: timedelta,
) -> None:
    """Joins the default process group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_timeout(timeout)
    dist.init_process_group(
        backend=backend, store=store, world_size=world_size, rank=rank, timeout=timeout
    )


def load(
    architecture: str,
    source: ModelSource,
    dp: int,
    tp: int,
    settings: Settings,
    device: torch.device,
) -> tuple[CausalLM, Topology]:
    """Loads this rank's part of the model.

    Raises:
        ValueError: the model cannot be loaded, or the world does not fit ``dp`` and ``tp``.
    """
    if settings.timeout is not None:
        set_timeout(timedelta(seconds=settings.timeout))
    if settings.threads:
        # The same on every rank: a different split of a sum gives different bits.
        torch.set_num_threads(settings.threads)
    param_dtype = _dtype("param_dtype", settings.param_dtype)
    topology = Topology.build(dp, tp, device, split=settings.split)
    if settings.replicas is not None and settings.replicas != topology.replicas:
        raise ValueError(
            f"replicas {settings.replicas} x dp {dp} x tp {tp} is not the world size "
            f"{topology.replicas * dp * tp}"
        )
    model = load_model(
        source,
        architecture=architecture,
        device=device,
        param_dtype=param_dtype,
        shard_mesh=topology.shard_mesh,
        tensor_mesh=topology.tensor_mesh,
        group=topology.copy,
        attn_implementation=choose_attention(
            settings.attn_implementation, device.type, read_config(source).get("model_type")
        ),
        sequence_length=settings.sequence_length,
        activation_checkpointing=settings.activation_checkpointing,
        liger=settings.liger,
        compile_blocks=settings.compile,
    )
    return model, topology


def build_trainer(
    model: CausalLM, topology: Topology, operation: Hyperparameters, settings: Settings
) -> Trainer:
    """The trainer that ``hyperparameters`` asks for."""
    return Trainer(
        model,
        topology,
        operation.schedule(),
        operation.optimizer_config(),
        micro_batch_size=operation.micro_batch_size,
        grad_accum_in_fp32=operation.grad_accum_in_fp32,
        exchanges=settings.replicas is not None,
        check_every=settings.check_every,
        optim_stats=settings.optim_stats,
        delta_dtype=_dtype("delta_dtype", settings.delta_dtype),
        offload_delta=settings.offload_delta,
        defer_grad_sync=settings.defer_grad_sync,
    )


def _dtype(field: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{field}: wanted one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


@dataclass(frozen=True)
class Counts:
    """What the ranks add up after a step with our core.

    Attributes:
        loss: mean over the real tokens of the batch whose loss was kept; NaN where there are none.
        nonfinite_losses: micro-batches left out because their loss was not finite.
        refused_gradients: replicas whose gradient was refused because it was not finite.
        bytes_sent: what one replica's ranks have sent to other replicas, together.
    """

    loss: float
    nonfinite_losses: int
    refused_gradients: int
    bytes_sent: int


class Totals:
    """A step's counts on their way: all ranks begin after ``train`` and ``wait`` a step later.

    Over a slow link they take as long as several round trips, which no step has to wait for.
    """

    def __init__(self, output: TrainOutput, trainer: Trainer) -> None:
        """Begins to add up over all ranks."""
        self._step = output.step
        self._refused = output.refused
        self._topology = trainer.topology
        # float64 holds any number of bytes exactly.
        here = output.kept.new_tensor(
            [output.nonfinite_losses, trainer.bytes_sent], dtype=torch.float64
        )
        tensors = (output.refused.view(1), output.kept, output.loss)
        total = torch.cat([here, *(t.double() for t in tensors)])
        group = self._topology.everyone
        # Over gloo from the host: the exchange of results has waited for the device already.
        self._sum = total if group is None else total.cpu()
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def wait(self) -> Counts:
        """Waits for the other ranks and for the device."""
        if self._work is not None:
            self._work.wait()
        left_out, sent, refused, kept, loss = self._sum.tolist()
        warn_of_refusal(self._step, self._refused)
        ranks = self._topology.dp * self._topology.tp
        return Counts(
            loss / kept if kept else math.nan,
            round(left_out / ranks),
            round(refused / ranks),
            round(sent / self._topology.replicas),
        )


def warn_of_refusal(step: int, refused: Tensor) -> None:
    """Says that this rank's gradient was refused, if it was; waits for the device."""
    if refused:
        log.warning("step %d: the gradient is not finite and is refused", step)


def serve_operations(
    store: SidecarStore,
    model: CausalLM,
    topology: Topology,
    settings: Settings,
    device: torch.device,
) -> None:
    """Carries out what rank 0 asks for, until ``exit``.

    With our core (``settings.replicas``) operations are read ahead, nobody waits for the others
    but in the exchange of results and a step late for its counts, and all ranks meet at the end.

    Raises:
        ValueError: an operation is not the protocol's, or wants a trainer before there is one.
    """
    trainer: Trainer | None = None
    totals: Totals | None = None
    ours = settings.replicas is not None
    if ours:
        store.read_ahead(topology.replica)
    while True:
        operation, packed = store.receive(device)
        reads = (messages.Forward, messages.Extract, messages.TruncateBf16)
        if trainer is not None and isinstance(operation, reads):
            trainer.plain()
        match operation:
            case messages.Exit():
                if totals is not None:
                    totals.wait()
                if ours:
                    # The store ends with rank 0: everybody has read it by now.
                    barrier(device, topology.everyone)
                return
            case messages.Hyperparameters():
                trainer = build_trainer(model, topology, operation, settings)
            case messages.Forward():
                evaluation.forward(
                    model,
                    topology,
                    unpack_batch(operation, packed, device)
                    if ours
                    else receive_batch(operation, device),
                    num_logits_to_keep=operation.num_logits_to_keep,
                    loss_scale=operation.loss_scale,
                )
            case messages.Extract():
                if trainer is not None and settings.check_every:
                    trainer.check_replicas()
                for _ in model.full_state_dict_iter():
                    pass  # the other ranks' part of each gather
            case messages.TruncateBf16():
                evaluation.truncate_bf16(model)
            case messages.Train() | messages.Optimize():
                if trainer is None:
                    raise ValueError(f"operation {operation.name!r} came before 'hyperparameters'")
                if ours and isinstance(operation, messages.Train):
                    began = _train_ahead(operation, packed, trainer, device)
                    if totals is not None:
                        totals.wait()
                    totals = began
                else:
                    _train(operation, trainer, device)
            case _:
                raise AssertionError(f"no handler for {operation.name}")


def _train_ahead(
    operation: messages.Train, packed: bytes, trainer: Trainer, device: torch.device
) -> Totals:
    output = trainer.train(
        operation.step,
        unpack_batch(operation, packed, device),
        zero_optim=operation.zero_optim,
        warmup_lr_between=operation.warmup_lr_between,
    )
    totals = Totals(output, trainer)
    if operation.optimize:
        trainer.optimize(operation.step, warmup_lr_between=operation.warmup_lr_between)
    return totals


def _train(
    operation: messages.Train | messages.Optimize, trainer: Trainer, device: torch.device
) -> None:
    results = receive_results(operation.results_len, operation.results_metadata, device)
    if isinstance(operation, messages.Optimize):
        trainer.optimize(
            operation.step, warmup_lr_between=operation.warmup_lr_between, results=results
        )
        return
    output = trainer.train(
        operation.step,
        receive_batch(operation, device),
        zero_optim=operation.zero_optim,
        warmup_lr_between=operation.warmup_lr_between,
        results=results,
    )
    dist.all_reduce(output.loss)
    warn_of_refusal(output.step, output.refused)
