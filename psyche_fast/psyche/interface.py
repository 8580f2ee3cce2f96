"""What Psyche's core hands to its Python models and asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PretrainedSourceRepoFiles:
    """A model as files.

    Attributes:
        files: paths of `config.json` and safetensors, among others.
    """

    files: list[str]


@dataclass
class PretrainedSourceStateDict:
    """A model as tensors.

    Attributes:
        config_json: the text of `config.json`.
        state_dict: full tensors by name.
    """

    config_json: str
    state_dict: dict[str, Tensor]


Source = PretrainedSourceRepoFiles | PretrainedSourceStateDict


class CausalLM(ABC):
    """A model as Psyche's core calls it: one rank's part of it."""

    @staticmethod
    @abstractmethod
    def from_pretrained(
        source: Source,
        device: torch.device,
        attn_implementation: str,
        dp: int = 1,
        tp: int = 1,
        override_max_position_embeddings: int | None = None,
        param_dtype: torch.dtype = torch.bfloat16,
        reduce_dtype: torch.dtype = torch.float32,
        fsdp_modules: Iterable[str] | None = None,
    ) -> CausalLM:
        """Loads this rank's part; all ranks call it alike.

        Args:
            source: where the model comes from.
            device: this rank's.
            attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
            dp: ranks that shard the model.
            tp: ranks that share each layer.
            override_max_position_embeddings: tokens per row.
            param_dtype: the type of forward and backward.
            reduce_dtype: the type in which gradients are summed.
            fsdp_modules: names of the classes that are sharded one by one.
        """

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None = None,
        sequence_lengths: list[list[int]] | None = None,
        num_logits_to_keep: int | None = None,
        loss_scale: float | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss of this rank's rows.

        Args:
            input_ids: int64 `[B, L]`, the same on every rank, as all tensors here.
            labels: int64 `[B, L]`, not shifted; None for no loss.
            position_ids: int64 `[B, L]`.
            sequence_lengths: the lengths of each row's documents.
            num_logits_to_keep: only the last so many positions' logits.
            loss_scale: the loss is divided by it.

        Returns:
            logits `[B // dp, L or fewer, V]` and the mean loss, 0-d, or None.
        """

    @abstractmethod
    def named_parameters(self) -> dict[str, Tensor]:
        """This rank's parameters by name, DTensors where they are split."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """`config.json` as plain data."""

    def train(self) -> None:  # noqa: B027 - what has no modes need not say so
        """Training mode."""

    def convert(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Tensors in the form of a checkpoint; as they are where nothing else is said."""
        return dict(self.named_parameters()) if state_dict is None else state_dict
