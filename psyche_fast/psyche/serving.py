"""A rank that Psyche's core drives: every operation is met by all ranks and waited for."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from psyche_fast.models import CausalLM, choose_attention, load_model
from psyche_fast.models.source import read_config
from psyche_fast.psyche import evaluation, messages
from psyche_fast.psyche.store import PsycheStore
from psyche_fast.psyche.tensors import receive_batch, receive_results
from psyche_fast.psyche.training import PsycheTrainer, reported_loss
from psyche_fast.rank.counts import warn_of_refusal
from psyche_fast.rank.topology import Topology
from psyche_fast.start.store import StoreClient

log = logging.getLogger(__name__)


def serve(client: StoreClient, device: torch.device) -> None:
    """Loads the model and carries out operations until `exit`.

    Args:
        client: the connection to the store; the process group is there by now.
        device: this rank's.

    Raises:
        ValueError: what rank 0 sent is not the protocol's, or it wants a trainer before there is
            one.
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
                _forward(operation, model, topology, device)
            case messages.Extract():
                for _ in model.full_state_dict_iter():
                    pass  # the other ranks' part of each gather
            case messages.TruncateBf16():
                evaluation.truncate_bf16(model)
            case messages.Train() | messages.Optimize():
                if trainer is None:
                    raise ValueError(f"operation {operation.name!r} came before 'hyperparameters'")
                _train(operation, trainer, device)
            case _:
                raise AssertionError(f"no handler for {operation.name}")


def _forward(
    operation: messages.Forward, model: CausalLM, topology: Topology, device: torch.device
) -> None:
    evaluation.forward(
        model,
        topology,
        receive_batch(operation, device),
        num_logits_to_keep=operation.num_logits_to_keep,
        loss_scale=operation.loss_scale,
    )


def _train(
    operation: messages.Train | messages.Optimize, trainer: PsycheTrainer, device: torch.device
) -> None:
    results = receive_results(operation.results_len, operation.results_metadata, device)
    batch = receive_batch(operation, device) if isinstance(operation, messages.Train) else None
    output = trainer.carry_out(operation, results, batch)
    if output is not None:
        dist.all_reduce(reported_loss(output))
        warn_of_refusal(output)
