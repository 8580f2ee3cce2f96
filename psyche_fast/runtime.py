"""What the core and the sidecars do alike on the way to a trainer."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.source import ModelSource, read_config
from psyche_fast.protocol import messages
from psyche_fast.protocol.messages import Hyperparameters, Settings
from psyche_fast.protocol.store import SidecarStore
from psyche_fast.protocol.tensors import receive_batch, receive_results
from psyche_fast.training.topology import Topology, set_timeout
from psyche_fast.training.trainer import Trainer, TrainOutput

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
    if settings.threads:
        # The same on every rank: a different split of a sum gives different bits.
        torch.set_num_threads(settings.threads)
    if settings.param_dtype not in _DTYPES:
        raise ValueError(
            f"param_dtype: wanted one of {', '.join(_DTYPES)}, got {settings.param_dtype!r}"
        )
    topology = Topology.build(dp, tp, device)
    if settings.replicas is not None and settings.replicas != topology.replicas:
        raise ValueError(
            f"replicas {settings.replicas} x dp {dp} x tp {tp} is not the world size "
            f"{topology.replicas * dp * tp}"
        )
    model = load_model(
        source,
        architecture=architecture,
        device=device,
        param_dtype=_DTYPES[settings.param_dtype],
        shard_mesh=topology.shard_mesh,
        tensor_mesh=topology.tensor_mesh,
        attn_implementation=choose_attention(
            settings.attn_implementation, device.type, read_config(source).get("model_type")
        ),
        sequence_length=settings.sequence_length,
        activation_checkpointing=settings.activation_checkpointing,
        liger=settings.liger,
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
    )


def counts(output: TrainOutput, topology: Topology, device: torch.device) -> tuple[int, int]:
    """Adds up over the replicas what was left out; ours only, beyond the protocol's one float.

    Returns:
        micro-batches left out for a loss, and gradients refused, because they were not finite.
    """
    both = torch.tensor([output.nonfinite_losses, int(output.refused)], device=device)
    dist.all_reduce(both)
    left_out, refused = (both // (topology.dp * topology.tp)).tolist()
    return left_out, refused


def serve_operations(
    store: SidecarStore,
    model: CausalLM,
    topology: Topology,
    settings: Settings,
    device: torch.device,
) -> None:
    """Carries out what rank 0 asks for, until ``exit``.

    Raises:
        ValueError: an operation is not the protocol's, or comes before ``hyperparameters``.
    """
    trainer: Trainer | None = None
    while True:
        operation = store.receive(device)
        if isinstance(operation, messages.Exit):
            return
        if isinstance(operation, Hyperparameters):
            trainer = build_trainer(model, topology, operation, settings)
        elif trainer is None:
            raise ValueError(f"operation {operation.name!r} came before 'hyperparameters'")
        else:
            _serve(operation, trainer, settings, device)


def _serve(
    operation: messages.Operation, trainer: Trainer, settings: Settings, device: torch.device
) -> None:
    match operation:
        case messages.Train():
            results = receive_results(operation.results_len, operation.results_metadata, device)
            output = trainer.train(
                operation.step,
                receive_batch(operation, device),
                zero_optim=operation.zero_optim,
                warmup_lr_between=operation.warmup_lr_between,
                results=results,
            )
            dist.all_reduce(output.loss)
            if settings.replicas is not None:
                counts(output, trainer.topology, device)
        case messages.Optimize():
            results = receive_results(operation.results_len, operation.results_metadata, device)
            trainer.optimize(
                operation.step, warmup_lr_between=operation.warmup_lr_between, results=results
            )
        case messages.Forward():
            trainer.forward(
                receive_batch(operation, device),
                num_logits_to_keep=operation.num_logits_to_keep,
                loss_scale=operation.loss_scale,
            )
        case messages.Extract():
            for _ in trainer.extract():
                pass  # the other ranks' part of each gather
        case messages.TruncateBf16():
            trainer.truncate_bf16()
        case _:
            raise AssertionError(f"no handler for {operation.name}")
