"""What a run would need: memory of a rank, bytes of a step, time of an exchange. Nothing is loaded.

The model is built and split by the code that trains it, as rank 0 of a process group without other
ranks, and goes through one forward and backward with tensors that have shapes but no content;
what these hold at most is added up. Any architecture of Transformers' can be estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from psyche_fast.batch import Batch
from psyche_fast.compat import (
    FakeStore,
    FakeTensorMode,
    StorageWeakRef,
    TorchDispatchMode,
    storage_key,
    tree_leaves,
    without_values,
)
from psyche_fast.config import RunConfig
from psyche_fast.devices import working_dtype
from psyche_fast.kernels.plan import ChunkPlan
from psyche_fast.kernels.reference.workspace import groups
from psyche_fast.links import Link
from psyche_fast.models import building, choose_attention, huggingface, parallel
from psyche_fast.models.causal_lm import CausalLM
from psyche_fast.models.head_loss import chunk_bytes, plain_bytes
from psyche_fast.models.source import read_model as read_model
from psyche_fast.models.source import vocabulary_size
from psyche_fast.models.tensor_parallel import tensor_parallel
from psyche_fast.rank.choice import Over, Place, choose, table
from psyche_fast.rank.costs import Costs, costs_of, distro_layout, state_bytes
from psyche_fast.rank.method import method_of
from psyche_fast.rank.topology import Topology
from psyche_fast.sharding import local_tensor


@dataclass(frozen=True)
class Estimate:
    """What one rank needs; bytes.

    Attributes:
        total_parameters: of the model, tied ones once.
        elements: of them this rank's part of those that are trained.
        parameters: this rank's part.
        gradients: kept from micro-batch to micro-batch.
        optimizer: DisTrO's momentum and copy of the parameters, AdamW's moments and copy, or the
            sum of `state`.
        activations: what forward and backward of one micro-batch hold beside the above at most.
        workspace: of DisTrO's kernels on a CPU, which they keep; on a GPU they have none.
        unsharded: FSDP2's whole blocks, and the whole gradient of one.
        snapshot: host memory beside the above while a checkpoint is written: copies of what a rank
            of the first replica writes; of further ones it is the optimizer's own part alone.
        sent: what this rank hands to the other replicas in a round; 0 for one replica.
        dense: the same for a dense exchange of the gradient, in a step.
        received: from the other replicas in a round.
        batch: rows of a step that the core sends to each other replica, once; 0 for one replica.
        state: what a method keeps, by kind (`rank.costs.state_bytes`); of others nothing.
        messages: a method's own message, and what comes for it.
        rounds: bytes and steps of the exchanges; None for one replica.
        over: the run over the link that was given.
        chosen: the same with settings that fit it, where a step's time was given.
        table: lines of what each method costs over it.
    """

    total_parameters: int
    elements: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    unsharded: int
    snapshot: int
    sent: int
    dense: int
    received: int
    batch: int
    state: dict[str, int]
    messages: int
    rounds: Costs | None
    over: Over | None
    chosen: Over | None
    table: list[str]

    @property
    def memory(self) -> int:
        """All of it at once, but for the snapshot."""
        kept = self.parameters + self.gradients + self.optimizer
        return kept + self.activations + self.workspace + self.unsharded + self.messages


class LiveBytes(TorchDispatchMode):
    """Adds up what the tensors that are created inside hold.

    Attributes:
        live: bytes now.
        peak: the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.live = 0
        self._created: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator and looks at the storages that it takes and gives."""
        if DTensor in types:
            return NotImplemented  # what it does inside passes this method again
        result = without_values(func, args, kwargs or {})
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and (key := storage_key(t)) not in self._created:
                self._given.add(key)
        new = False
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and (key := storage_key(t)) not in self._given:
                known = self._created.get(key)
                if known is None or known[0].expired():
                    storage = t.untyped_storage()
                    self._created[key] = StorageWeakRef(storage), storage.nbytes()
                    new = True
        if new:
            self._created = {
                k: entry for k, entry in self._created.items() if not entry[0].expired()
            }
            self.live = sum(size for _, size in self._created.values())
            self.peak = max(self.peak, self.live)
        return result


@contextmanager
def _nobody(world: int) -> Iterator[None]:
    """A process group without other ranks; its collectives do nothing."""
    if dist.is_initialized():
        raise ValueError("estimate: this process already has a process group")
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)  # its checks between ranks want ranks
    dist.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        dist.set_debug_level(level)


def estimate(
    model: dict[str, Any],
    run: RunConfig,
    device_type: str = "cpu",
    *,
    link: Link | None = None,
    ranks: int = 1,
    step: float | None = None,
) -> Estimate:
    """Estimates what a rank of `run` needs.

    Args:
        model: `config.json` of a Transformers model.
        run: as `train` would take it; its `model` is not looked at.
        device_type: what attention is chosen for. Forward is gone through as the CPU does it.
        link: of each host.
        ranks: of a host, which share its link.
        step: seconds of a step without exchanges.

    Raises:
        ValueError: the model cannot be built or split so, or the method cannot take it.
    """
    given = run.model.param_dtype, run.model.master_dtype
    run = run.replace(param_dtype=working_dtype(*given, device_type))
    method = method_of(run)
    dtype: torch.dtype = getattr(torch, run.model.param_dtype)
    attention = choose_attention(
        run.model.attn_implementation, device_type, model.get("model_type")
    )
    if attention == "flash_attention_2":
        attention = "sdpa"  # holds as much
    device = torch.device("cpu")
    with _nobody(run.parallelism.world_size):
        topology = Topology.build(
            run.parallelism.data_parallelism, run.parallelism.tensor_parallelism, device
        )

        def build() -> tuple[nn.Module, dict[str, str]]:
            with torch.device("meta"):  # buffers too: what is in them does not matter
                module = huggingface.build(model, dtype, attention, run.model.sequence_length)
            aliases = building.tied_names(module)
            if run.model.activation_checkpointing:
                huggingface.enable_activation_checkpointing(module)
            if topology.tensor_mesh is not None:
                tensor_parallel(module, topology.tensor_mesh, module.config, aliases)
            return module, aliases

        activations = _activations(*build(), run, attention, device_type)
        module, _ = build()
        largest = [sum(_bytes(p) for p in b.parameters()) for b in parallel.blocks(module).values()]
        rest = sum(map(_bytes, module.parameters())) - sum(largest)
        if topology.shard_mesh is not None:
            parallel.shard(module, topology.shard_mesh)
        everything = list(module.parameters())
        named = {n: p for n, p in sorted(module.named_parameters()) if p.requires_grad}
        own = sum(map(_bytes, named.values()))
        elements = own // dtype.itemsize
        master = max(getattr(torch, run.model.master_dtype).itemsize, dtype.itemsize)
        optimizer = workspace = messages = 0
        kept = 0  # of the optimizer's state
        copies = master * elements if master > dtype.itemsize else 0
        state: dict[str, int] = {}
        replicas = run.parallelism.replicas
        exchanges = replicas > 1 and (method is not None or run.optimizer.distro)
        rounds = costs_of(run, named, method) if exchanges else None
        if method is not None:
            state = state_bytes(method, named, replicas, has_masters=copies > 0)
            optimizer = sum(state.values())
            kept = optimizer - state["masters"]
            messages = (
                max(map(sum, zip(rounds.messages, rounds.down, strict=True))) if rounds else 0
            )
        elif run.optimizer.distro:
            layout, shared = distro_layout(run, named)
            delta = getattr(torch, run.optimizer.delta_dtype).itemsize
            chunks = sum(plan.chunks * plan.totalk for plan in layout.plans)
            optimizer = chunks * (master + delta)
            # Momentum, and entries of two bytes and four: own ones, and those of all replicas.
            entries = 6 * sum(plan.chunks * plan.k for plan in layout.plans)
            kept = chunks * delta + entries * (1 + replicas)
            if device_type == "cpu":
                workspace = max((_workspace(plan, replicas) for plan in layout.plans), default=0)
            if run.optimizer.offload_delta:
                optimizer = chunks * master
            # Where chunks are cut: index tables of 8 bytes, and the chunks themselves.
            for at in shared:
                part = layout.parameters[at].chunks * layout.parameters[at].totalk
                held = local_tensor(list(named.values())[at].detach()).numel()
                optimizer += 8 * (part + held) + part * dtype.itemsize
        else:
            kept = 2 * master * elements
            optimizer = copies + kept
        over = chosen = None
        lines: list[str] = []
        if link is not None and rounds is not None:
            place = Place(run, named, link, step, ranks)
            over = place.over("distro" if method is None else str(run.exchange.method), run, method)
            chosen = None if step is None else choose(place)
            lines = table(place)
    sharded = run.parallelism.data_parallelism > 1
    # The block at work and the next one, and embedding and head beside them; gradients of a block
    # whole, and in fp32 on their way to the ranks.
    most = max([*largest, 0])
    unsharded = 2 * most + rest + most + most * 4 // dtype.itemsize if sharded else 0
    return Estimate(
        total_parameters=sum(p.numel() for p in everything),
        elements=elements,
        parameters=sum(map(_bytes, everything)),
        gradients=elements * (4 if run.training.grad_accum_in_fp32 else dtype.itemsize),
        optimizer=optimizer,
        activations=activations,
        workspace=workspace,
        unsharded=unsharded,
        snapshot=sum(map(_bytes, everything)) + copies + kept,
        sent=max(rounds.messages) if rounds else 0,
        dense=own if replicas > 1 else 0,
        received=max(rounds.down) if rounds else 0,
        batch=_batch(model, run),
        state=state,
        messages=messages,
        rounds=rounds,
        over=over,
        chosen=chosen,
        table=lines,
    )


def _batch(model: dict[str, Any], run: RunConfig) -> int:
    replicas = run.parallelism.replicas
    if replicas == 1:
        return 0
    width = 2 if (vocabulary_size(model) or 0) <= 1 << 16 else 4
    return width * -(-run.run.total_batch // replicas) * run.model.sequence_length


def _bytes(parameter: Tensor) -> int:
    local = local_tensor(parameter.detach())
    return local.numel() * local.element_size()


def _workspace(plan: ChunkPlan, replicas: int) -> int:
    """What `kernels.reference` keeps: coefficients, magnitudes, chunks, their factors, sums."""
    # A rank may have no chunk of a class that others have.
    slices = max((part.stop - part.start for part in plan.slices), default=0)
    group = max((g[-1].stop - g[0].start for g in groups(plan)), default=0)
    numbers = (2 * group + slices) * plan.totalk + slices * plan.k * (plan.h + plan.w)
    if replicas > 1:  # entries of one are not added up
        numbers += 2 * slices * plan.totalk
    return numbers * plan.compute_dtype.itemsize


def _activations(
    module: nn.Module, aliases: dict[str, str], run: RunConfig, attention: str, device_type: str
) -> int:
    """Bytes that forward and backward of a micro-batch hold at most, whole gradients apart."""
    device = torch.device("cpu")
    rows = run.training.micro_batch, run.model.sequence_length
    settings: Any = module.config
    logits = 4 * math.prod(rows) * (vocabulary_size(settings.to_dict()) or 0)
    # As the device decides it, where this machine would not.
    is_plain = run.model.loss == "auto" and logits <= plain_bytes(device_type)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device=device)
        building.tie(module, aliases)
        model = CausalLM(
            module, config=settings.to_dict(), architecture="HfAuto", device=device,
            attn_implementation=attention,
            class_name=type(module).__name__, blocks=(),
            loss="plain" if run.parallelism.tensor_parallelism > 1 or is_plain else run.model.loss,
        )  # fmt: skip
        for parameter in module.parameters():
            # Counted apart; in this pass each lives as long as it takes to be added.
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        model.train()
        batch = Batch(torch.zeros(rows, dtype=torch.int64))
        try:
            with LiveBytes() as bytes_:
                model.loss(batch).backward()
            without_logits = model.goes_without_logits(batch)
        # An architecture that reads values fails in any way; what it would hold is not known.
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(
                f"estimate: {type(module).__name__} cannot be gone through without values, so "
                f"there is no estimate: {type(error).__name__}: {why}"
            ) from error
    if not without_logits:
        return bytes_.peak
    # Chunks of the loss are of the size that the device has them in, not this machine.
    head = module.get_output_embeddings().weight  # type: ignore[operator]
    here, there = (chunk_bytes(kind, math.prod(rows), head) for kind in ("cpu", device_type))
    return bytes_.peak + there - here
