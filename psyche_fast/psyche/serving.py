"""A rank that Psyche's core drives: every operation is met by all ranks and waited for."""

from __future__ import annotations

import json
import logging

import torch
import torch.distributed as dist

from psyche_fast.models.registry import check_named
from psyche_fast.models.source import FilesSource
from psyche_fast.psyche import interface, messages
from psyche_fast.psyche.model import make_causal_lm
from psyche_fast.psyche.store import PsycheStore
from psyche_fast.psyche.tensors import receive_batch, receive_results
from psyche_fast.psyche.trainer import Trainer
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
    architecture, own = store.receive_model()
    check_named(architecture)
    source: interface.Source
    if isinstance(own, FilesSource):
        source = interface.PretrainedSourceRepoFiles([str(file) for file in own.files])
    else:
        source = interface.PretrainedSourceStateDict(own.config_json, own.tensors)
    dp, tp = store.receive_parallelism()
    # What attends and the like are rank 0's to say: nobody has told this rank.
    model = make_causal_lm(architecture, source, device, "sdpa", dp, tp)
    del own, source
    log.info("loaded %s on %s", architecture, device)
    trainer: Trainer | None = None
    while True:
        operation = store.receive()
        match operation:
            case messages.Exit():
                return
            case messages.Hyperparameters():
                _check_clipping(operation, tp)
                trainer = Trainer(
                    device,
                    model,
                    json.dumps(operation.lr_scheduler),
                    json.dumps(operation.optimizer),
                    json.dumps(model.get_config()),
                    operation.micro_batch_size,
                    operation.grad_accum_in_fp32,
                )
            case messages.Forward():
                _forward(operation, model, device)
            case _ if trainer is None:
                name = operation.__struct_config__.tag
                raise ValueError(f"operation {name!r} came before 'hyperparameters'")
            case messages.Train():
                _train(operation, trainer, device)
            case messages.Optimize():
                results = receive_results(operation.results_len, operation.results_metadata, device)
                trainer.optimize(operation.step, operation.warmup_lr_between, results)
            case messages.Extract():
                trainer.extract()
            case messages.TruncateBf16():
                trainer.truncate_bf16()
            case _:
                raise AssertionError(f"no handler for {operation}")


def _check_clipping(operation: messages.Hyperparameters, tp: int) -> None:
    optimizer = messages.read_optimizer(operation.optimizer)
    limit = None if optimizer is None else optimizer.clip_grad_norm
    if tp > 1 and limit is not None and limit > 0:
        raise ValueError(
            f"clip_grad_norm {limit:g} with tensor parallelism: Psyche's core panics there, once "
            "it has trained; set it to null or to 0"
        )


@torch.no_grad()
def _forward(operation: messages.Forward, model: interface.CausalLM, device: torch.device) -> None:
    batch = receive_batch(operation, device)
    model.forward(
        batch.input_ids,
        batch.labels,
        batch.position_ids,
        batch.sequence_lengths,
        operation.num_logits_to_keep,
        operation.loss_scale,
    )


def _train(operation: messages.Train, trainer: Trainer, device: torch.device) -> None:
    results = receive_results(operation.results_len, operation.results_metadata, device)
    batch = receive_batch(operation, device)
    _, loss = trainer.train(
        operation.step,
        operation.zero_optim,
        operation.batch_id,
        batch.input_ids,
        batch.labels,
        batch.position_ids,
        batch.sequence_lengths,
        operation.warmup_lr_between,
        results,
    )
    dist.all_reduce(torch.tensor([loss], dtype=torch.float32, device=device))
