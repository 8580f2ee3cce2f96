"""A rank that Psyche's core drives: every operation is met by all ranks and waited for."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.source import read_config
from psyche_fast.psyche import messages
from psyche_fast.psyche.store import PsycheStore
from psyche_fast.psyche.tensors import receive_batch, receive_results
from psyche_fast.psyche.training import PsycheTrainer, reported_loss
from psyche_fast.rank.counts import warn_of_refusal
from psyche_fast.rank.gradients import local_parts
from psyche_fast.rank.topology import Topology
from psyche_fast.start.store import StoreClient

log = logging.getLogger(__name__)


def serve(client: StoreClient, device: torch.device) -> None:
    """Loads the model and carries out operations until `exit`.

    Args:
        client: the connection to the store; the process group is up by now.
        device: this rank's.

    Raises:
        ValueError: what rank 0 sent is not the protocol's, or it wants a trainer before
            `hyperparameters`.
    """
    store = PsycheStore(client, device)
    architecture, source = store.receive_model()
    topology = Topology.build(*store.receive_parallelism(), device)
    model = load_model(
        source,
        architecture=architecture,
        device=device,
        shard_mesh=topology.shard_mesh,
        tensor_mesh=topology.tensor_mesh,
        group=topology.copy,
        attn_implementation=choose_attention(
            "auto", device.type, read_config(source).get("model_type")
        ),
    )
    log.info("loaded %s on %s", architecture, device)
    trainer: PsycheTrainer | None = None
    while True:
        operation = store.receive()
        reads = (messages.Forward, messages.Extract, messages.TruncateBf16)
        if trainer is not None and isinstance(operation, reads):
            trainer.plain()
        match operation:
            case messages.Exit():
                return
            case messages.Hyperparameters():
                trainer = PsycheTrainer(model, topology, operation)
            case messages.Forward():
                batch = receive_batch(operation, device)
                keep, scale = operation.num_logits_to_keep, operation.loss_scale
                forward(model, topology, batch, keep, scale)
            case messages.Extract():
                for _ in model.full_state_dict_iter():
                    pass  # the other ranks' part of each gather
            case messages.TruncateBf16():
                truncate_bf16(model)
            case messages.Train() | messages.Optimize():
                if trainer is None:
                    name = operation.__struct_config__.tag
                    raise ValueError(f"operation {name!r} came before 'hyperparameters'")
                _train(operation, trainer, device)
            case _:
                raise AssertionError(f"no handler for {operation}")


@torch.no_grad()
def forward(
    model: CausalLM,
    topology: Topology,
    batch: Batch,
    num_logits_to_keep: int | None,
    loss_scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Forward without gradient, each dp rank on its rows.

    Args:
        model: this rank's model.
        topology: this rank's groups.
        batch: the whole batch, the same on every rank.
        num_logits_to_keep: only the last so many positions' logits.
        loss_scale: the loss is divided by it.

    Returns:
        logits of this rank's rows and, where the batch has labels, their loss.

    Raises:
        ValueError: a malformed batch.
    """
    mine = model.prepare(batch).pad_rows(topology.dp).share(topology.shard, topology.dp)
    was_training = model.module.training
    model.eval()
    try:
        return model.forward(mine, num_logits_to_keep=num_logits_to_keep, loss_scale=loss_scale)
    finally:
        if was_training:
            model.train()


@torch.no_grad()
def truncate_bf16(model: CausalLM) -> None:
    """Rounds the parameters to bfloat16 in place."""
    for part in local_parts(model.named_parameters()).values():
        part.copy_(part.to(torch.bfloat16))


def _train(
    operation: messages.Train | messages.Optimize, trainer: PsycheTrainer, device: torch.device
) -> None:
    results = receive_results(operation.results_len, operation.results_metadata, device)
    batch = receive_batch(operation, device) if isinstance(operation, messages.Train) else None
    output = trainer.carry_out(operation, results, batch)
    if output is not None:
        dist.all_reduce(reported_loss(output))
        warn_of_refusal(output)
