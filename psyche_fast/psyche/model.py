"""Models as Psyche's core calls them: our loading, attention, packing and tensor plans under it.

Rank 0 is the core's own process, the further ones are sidecars. All of them come to
`make_causal_lm` with the same model, and what only rank 0 has been told it tells them there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from psyche_fast import compat, models
from psyche_fast.batch import IGNORE, Batch
from psyche_fast.models import huggingface, registry
from psyche_fast.models.attention import choose_attention
from psyche_fast.models.source import (
    FilesSource,
    ModelSource,
    TensorsSource,
    read_config,
    text_config,
)
from psyche_fast.psyche import interface
from psyche_fast.rank.topology import Topology

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)
"""How long a collective waits for the other ranks: a core loads and warms up at its leisure."""

_KEY = "psyche_fast/rank-0"
_REMIND_AFTER = timedelta(seconds=60)


class _Choices(msgspec.Struct, frozen=True):
    """What rank 0 is told and the others are not, and what all have to have alike."""

    attn_implementation: str
    override_max_position_embeddings: int | None
    param_dtype: str
    torch: str


def make_causal_lm(
    architecture: str,
    source: interface.Source,
    device: torch.device | str | int,
    attn_implementation: str,
    dp: int = 1,
    tp: int = 1,
    override_max_position_embeddings: int | None = None,
    param_dtype: torch.dtype = torch.bfloat16,
    reduce_dtype: torch.dtype = torch.float32,
    fsdp_modules: Iterable[str] | None = None,
) -> interface.CausalLM:
    """Loads this rank's part of a model.

    Args:
        architecture: `HfAuto` or another `Hf...`, a registered name, or `module:function`; or
            `module:Class` of a subclass of `interface.CausalLM`, whose `from_pretrained` is called.
        source: files, or tensors.
        device: a number is a CUDA index.
        attn_implementation: `eager`, `sdpa` or `flash_attention_2`; rank 0's counts.
        dp: ranks that shard the model with FSDP2.
        tp: ranks that share each layer.
        override_max_position_embeddings: tokens per row; rank 0's counts.
        param_dtype: the type of forward and backward; rank 0's counts. Parameters are of that type
            too, but with `dp` over 1 of the type that `config.json` names.
        reduce_dtype: float32 alone.
        fsdp_modules: None alone: a model says itself what its blocks are.

    Raises:
        ValueError: the model cannot be loaded as asked; what and why.
    """
    if not isinstance(device, torch.device):
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if architecture == "Torchtitan":
        raise ValueError(
            "architecture 'Torchtitan': its model code is torchtitan's and is not part of "
            "psyche_fast, nor is the order of its collectives known; use HfAuto, or Psyche's own "
            "Python package"
        )
    builder = registry.resolve(architecture)
    if isinstance(builder, type) and issubclass(builder, interface.CausalLM):
        return builder.from_pretrained(
            source=source,
            device=device,
            attn_implementation=attn_implementation,
            dp=dp,
            tp=tp,
            override_max_position_embeddings=override_max_position_embeddings,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            fsdp_modules=fsdp_modules,
        )
    if reduce_dtype != torch.float32 or fsdp_modules is not None:
        raise ValueError(
            f"reduce_dtype {reduce_dtype} and fsdp_modules {fsdp_modules}: gradients are summed in "
            "float32, and a model's blocks are found by its own description"
        )
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != dp * tp:
        raise ValueError(f"dp {dp} x tp {tp} is not the number of ranks, {world}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    choices = _Choices(
        attn_implementation,
        override_max_position_embeddings,
        str(param_dtype).removeprefix("torch."),
        str(torch.__version__),
    )
    topology = Topology()
    if world > 1:
        choices = _agree(choices)
        compat.set_default_timeout(PATIENCE)  # of the mesh's groups too
        topology = Topology.build(dp, tp, device)
    return _load(architecture, source, device, choices, topology)


def _agree(own: _Choices) -> _Choices:
    """Rank 0's choices, through the process group's store.

    Raises:
        ValueError: the ranks have different versions of torch.
    """
    store = compat.default_store()
    if dist.get_rank() == 0:
        store.set(_KEY, msgspec.json.encode(own).decode())
        return own
    try:
        store.wait([_KEY], _REMIND_AFTER)
    except dist.DistStoreError:
        log.warning(
            "rank 0 has not built its model after %g s; is the folder of `psyche-fast psyche-path` "
            "first on the PYTHONPATH of Psyche's core too?",
            _REMIND_AFTER.total_seconds(),
        )
        store.wait([_KEY], PATIENCE)
    choices = msgspec.json.decode(store.get(_KEY), type=_Choices)
    if choices.torch != own.torch:
        raise ValueError(
            f"this rank has torch {own.torch}, rank 0 {choices.torch}; FSDP2 gathers at other "
            "times in other versions, so that the ranks would wait for one another for ever"
        )
    return choices


def _load(
    architecture: str,
    source: interface.Source,
    device: torch.device,
    choices: _Choices,
    topology: Topology,
) -> Model:
    own: ModelSource
    if isinstance(source, interface.PretrainedSourceRepoFiles):
        own = FilesSource.from_strings(list(source.files))
    else:
        own = TensorsSource(source.config_json, dict(source.state_dict))
    config = read_config(own)
    compute = getattr(torch, choices.param_dtype)
    dtype = compute if topology.dp == 1 else _stored_dtype(config)
    model = models.load_model(
        own,
        architecture=architecture,
        device=device,
        param_dtype=dtype,
        compute_dtype=compute,
        shard_mesh=topology.shard_mesh,
        tensor_mesh=topology.tensor_mesh,
        group=topology.copy,
        attn_implementation=choose_attention(
            choices.attn_implementation, device.type, config.get("model_type")
        ),
        sequence_length=choices.override_max_position_embeddings,
    )
    if isinstance(model.module, PreTrainedModel) and model.module.supports_gradient_checkpointing:
        huggingface.enable_activation_checkpointing(model.module)
    return Model(model, topology, choices.override_max_position_embeddings)


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """The type that `config.json` names: float32 where it names none.

    Raises:
        ValueError: it is none of torch's floating-point types.
    """
    for fields in (config, text_config(config)):
        name = fields.get("dtype") or fields.get("torch_dtype")
        if name is None:
            continue
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"config.json: dtype: wanted a floating-point type, got {name!r}")
        return dtype
    return torch.float32


class Model(interface.CausalLM):
    """Our model behind Psyche's face.

    Args:
        model: this rank's part.
        topology: this rank's place.
        max_positions: what the core takes for the configuration's `max_position_embeddings`.
    """

    def __init__(
        self, model: models.CausalLM, topology: Topology, max_positions: int | None = None
    ) -> None:
        self.model = model
        self.device = model.device
        self._topology = topology
        self._max_positions = max_positions

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> interface.CausalLM:
        """`make_causal_lm` of `HfAuto`."""
        return make_causal_lm("HfAuto", *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None = None,
        sequence_lengths: list[list[int]] | None = None,
        num_logits_to_keep: int | None = None,
        loss_scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and loss of this rank's rows, `rows // dp` of them; the rest are dropped.

        Documents are told apart by `position_ids` and, where there are none, by
        `sequence_lengths`. Labels count as they come: none is left out at a document's edge.

        Returns:
            logits `[B // dp, L or fewer, V]` and the mean over the labels that count, fp32, 0-d;
            0 with zero gradients where none does.

        Raises:
            ValueError: a malformed batch, or packed rows for a model whose documents would see one
                another.
        """
        lengths = sequence_lengths if position_ids is None else None
        # The whole batch, before it is cut: all ranks have to see alike that it is packed, for with
        # the first such batch they ask the model, by tiny forwards, whether it keeps documents
        # apart. (Not at the start: these gather the whole model several times.)
        batch = self.model.prepare(Batch(input_ids, labels, position_ids, lengths))
        if labels is not None:
            batch = replace(batch, labels=labels.to(self.device), tokens=None)
            batch = replace(batch, tokens=batch.real_tokens())
        else:
            batch = replace(batch, labels=None)
        rows = batch.rows // self._topology.dp
        mine = batch.slice(self._topology.shard * rows, (self._topology.shard + 1) * rows)
        if rows == 0:  # every rank takes part in the collectives of a forward, with some row
            mine = batch.slice(0, 1)
            if mine.labels is not None:
                ignored = torch.full_like(mine.labels, IGNORE)
                mine = replace(mine, labels=ignored, tokens=[0])
        with self._on_device():
            logits, loss = self.model.forward(
                mine, num_logits_to_keep=num_logits_to_keep, loss_scale=loss_scale
            )
        return logits[:rows], loss

    def _on_device(self) -> AbstractContextManager[Any]:
        # The core calls from threads of its own, and a thread begins on the first GPU.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def named_parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by name, tied ones once; DTensors where they are split."""
        return dict(self.model.named_parameters())

    def get_config(self) -> dict[str, Any]:
        """`config.json` as plain data."""
        config = json.loads(json.dumps(self.model.config, default=str))
        if self._max_positions is not None:
            config["max_position_embeddings"] = self._max_positions
        return dict(config)

    def train(self) -> None:
        """Training mode."""
        self.model.train()

    def convert(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Tensors under the names and in the form of the checkpoint that the model came from.

        Args:
            state_dict: whole tensors by the names of `named_parameters`; None for this rank's own
                as they are.
        """
        if state_dict is None:
            return dict(self.model.module.state_dict())
        if not isinstance(self.model.module, PreTrainedModel):
            return state_dict
        return dict(huggingface.revert(self.model.module, state_dict))
