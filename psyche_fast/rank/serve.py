"""What every rank of our own core's does; the further ones under its lead."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from psyche_fast.compat import set_default_timeout
from psyche_fast.config import RunConfig
from psyche_fast.distro.gathers import Gathers
from psyche_fast.links import Link
from psyche_fast.models import CausalLM
from psyche_fast.models.loading import load_configured
from psyche_fast.models.registry import check_named
from psyche_fast.models.source import ModelSource
from psyche_fast.rank import elastic, evaluation, protocol
from psyche_fast.rank.beats import Beats, Patience
from psyche_fast.rank.counts import Totals
from psyche_fast.rank.elastic import Start
from psyche_fast.rank.hub import Peers
from psyche_fast.rank.levels import LevelsOptimizer, levels_of
from psyche_fast.rank.link import settle
from psyche_fast.rank.memory import snapshot_if_full
from psyche_fast.rank.method import MethodOptimizer, method_of
from psyche_fast.rank.optimizers import Optimizer, make_optimizer
from psyche_fast.rank.saving import StateWriter, restore
from psyche_fast.rank.simulated import Simulated
from psyche_fast.rank.topology import GRACE, Topology
from psyche_fast.rank.trainer import Trainer, trainable
from psyche_fast.start.libraries import keep_freed_memory
from psyche_fast.start.logs import keep_rank_log
from psyche_fast.start.store import StoreClient, barrier

log = logging.getLogger(__name__)


def build_trainer(
    config: RunConfig, source: ModelSource, device: torch.device, peers: Gathers | None = None
) -> Trainer:
    """Loads this rank's part of the model and makes its trainer; all ranks take part.

    Args:
        config: the run, resolved.
        source: the model.
        device: this rank's.
        peers: of an elastic run.

    Raises:
        ValueError: the model cannot be loaded, or the world is not the run's.
    """
    set_default_timeout(timedelta(seconds=config.machines.timeout) + GRACE)
    if config.machines.threads:
        # The same on every rank: a different split of a sum gives different bits.
        torch.set_num_threads(config.machines.threads)
    topology = Topology.of(config.parallelism, device, peers)
    model = load_configured(
        source,
        config.model,
        device=device,
        shard_mesh=topology.shard_mesh,
        tensor_mesh=topology.tensor_mesh,
        group=topology.copy,
    )
    if config.parallelism.simulate:
        link = None if config.exchange.link is None else Link.parse(config.exchange.link)
        make = partial(_trainer_of, config, model)
        return Simulated(model, config.parallelism.simulate, make, link)
    settled = None
    if config.exchange.link is not None and config.run.resume is None:
        settled = settle(config, model, trainable(model), topology)
        config = config.replace(**settled.changes)
    trainer = _trainer_of(config, model, topology)
    trainer.settled = settled
    return trainer


def _trainer_of(config: RunConfig, model: CausalLM, topology: Topology) -> Trainer:
    parameters, method = trainable(model), method_of(config)
    undecayed = model.all_but_matrices() if config.optimizer.decay == "matrices" else ()
    optimizer: Optimizer
    levels, peers = levels_of(config), topology.peers
    if method is not None or levels is not None:
        assert isinstance(peers, Peers) or not isinstance(peers, Gathers), "refused by then"
        if levels is not None:
            optimizer = LevelsOptimizer(parameters, levels, peers, undecayed)
        else:
            assert method is not None
            optimizer = MethodOptimizer(parameters, method, peers, model.masters, undecayed)
    else:
        optimizer = make_optimizer(
            config.optimizer, parameters, topology.peers, model.masters, undecayed
        )
    return Trainer(
        model,
        topology,
        config.schedule.learning_rates(),
        optimizer,
        config.training,
        config.optimizer.max_grad_norm,
    )


def serve(client: StoreClient, device: torch.device, start: Start | None = None) -> None:
    """Loads the model and carries out what the core says until the end of the run.

    Nobody waits for the others but in the exchange of results and, a step late, for its counts.

    Args:
        client: the connection to the store.
        device: this rank's.
        start: of a rank of an elastic run; of others the process group is there by now.

    Raises:
        ValueError: what the core says is not understood, or the model cannot be loaded.
    """
    config, source = protocol.receive_run(client)
    check_named(config.model.python_arch)
    assert config.run.output is not None, "resolved by the core"
    epochs = None if start is None else start.epochs(client, config.parallelism, device)
    rank = dist.get_rank() if epochs is None else epochs.rank
    logs = Path(config.run.output, "logs")
    keep_rank_log(logs / f"rank-{rank}.log", rank, config.tracking.log_level)
    beats, patience = Beats(client, rank, logs), Patience(config.machines.timeout)
    if device.type == "cpu":
        keep_freed_memory(os.environ)
    trainer = build_trainer(config, source, device, epochs)
    folder = config.run.output
    if trainer.settled is not None:
        config = config.replace(**trainer.settled.changes)
    if epochs is None or not epochs.joins:
        restore(trainer, config)
    log.info("loaded %s on %s", config.model.python_arch, device)
    first = 0 if epochs is None else elastic.enter(epochs, client, trainer)
    inbox = protocol.Inbox(client, trainer.topology, first)
    writer = StateWriter(client.clone(), folder)
    totals: Totals | None = None
    step = 0
    with beats, snapshot_if_full(logs, rank):
        while True:
            beats.at(step, "waiting")
            match inbox.next():
                case protocol.Train() as operation:
                    step, started = operation.step, time.monotonic()
                    beats.at(step, "train")
                    output = trainer.train(step, operation.batch())
                    began = Totals(output, trainer)
                    beats.at(step, "optimize")
                    trainer.optimize(step)
                    if totals is not None:
                        beats.at(step, "counts")
                        totals.wait()
                    totals = began
                    patience.took(time.monotonic() - started)
                    client.seconds = patience.seconds
                case protocol.Save(step, at_once):
                    beats.at(step, "checkpoint")
                    writer.save(trainer, step, at_once=at_once)
                case protocol.Gather():
                    beats.at(step, "checkpoint")
                    if trainer.topology.replica == 0:
                        for _ in trainer.model.full_state_dict_iter():
                            pass  # this rank's part of each gather
                case protocol.Join():
                    beats.at(step, "join")
                    elastic.welcome(trainer)
                case protocol.Evaluate(rows):
                    beats.at(rows.step, "evaluate")
                    evaluation.evaluate(trainer, rows.batch())
                case protocol.Continue(at, prompts, tokens):
                    beats.at(at, "sample")
                    evaluation.continued(trainer, prompts, tokens)
                case protocol.Exit():
                    if totals is not None:
                        totals.wait()
                    writer.close()
                    # The store ends with rank 0: everybody has read it by now.
                    if epochs is not None:
                        epochs.close()
                    else:
                        barrier(device, trainer.topology.everyone)
                    return
