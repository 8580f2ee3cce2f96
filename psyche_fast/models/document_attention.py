"""Attention to packed documents without a mask: each document by itself.

Transformers' sdpa attention keeps documents of one row apart by a mask of `B x 1 x L x L`, which
takes memory in the square of the row and keeps PyTorch from its flash kernels. What is computed
here is the same, document by document: no mask, and the square of each document only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from psyche_fast.compat import sdpa_attention_forward, supported_attention

SDPA_DOCUMENTS = "sdpa_documents"
"""The name under which Transformers finds it; no mask is made for names that it does not know."""


@dataclass(frozen=True)
class Documents:
    """The documents of a row, which layers hand on as one object (torch.compile reads no lengths).

    Attributes:
        lengths: in the order of the row, which they fill.
        seen: takes what layers come with: `window`, a sliding one; `mask`, one of their own.
    """

    lengths: list[int]
    seen: set[str]


@torch.compiler.disable  # how many documents there are is another number in each batch
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function, called by its layers.

    Args:
        module: the layer.
        query: `[B, heads, L, head size]`; B is 1 where there are documents.
        key: the same, with its own number of heads.
        value: as `key`.
        attention_mask: one that the architecture makes itself; documents are not kept apart then.
        documents: those of the row; None for one.
        sliding_window: how many tokens a token sees, itself included; None for all before it.
        **kwargs: for `sdpa_attention_forward`.

    Returns:
        `[B, L, heads, head size]` and None.
    """
    if attention_mask is not None:
        if documents is not None:
            documents.seen.add("mask")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if documents is None:
        lengths = [query.shape[2]]
    else:
        lengths = documents.lengths
        if sliding_window is not None:
            documents.seen.add("window")
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    found = []
    for q, k, v in parts:
        length = q.shape[2]
        window = min(sliding_window or length, length)
        # Windows as long as the document are one piece; others cost a mask of 2 x window^2, not
        # one of length^2.
        for start in range(0, length, window):
            queries = slice(start, min(start + window, length))
            keys = slice(max(start - window + 1, 0), queries.stop)
            band = _band(queries.stop - start, start - keys.start, window, q.device)
            found.append(
                sdpa_attention_forward(
                    module, q[:, :, queries], k[:, :, keys], v[:, :, keys], band, **kwargs
                )[0]
            )
    return (found[0] if len(found) == 1 else torch.cat(found, dim=1)), None


@lru_cache(maxsize=4)
def _band(count: int, before: int, window: int, device: torch.device) -> Tensor | None:
    """Which keys `count` queries see: bool `[1, 1, count, before + count]`.

    None for all up to the query's own, where no key goes `before` the first query.
    """
    if before == 0:
        return None
    query = torch.arange(before, before + count, device=device)
    behind = query[:, None] - torch.arange(before + count, device=device)
    return ((behind >= 0) & (behind < window))[None, None]


def takes_documents(model: PreTrainedModel) -> bool:
    """Whether a model may hand `documents` on to its layers, as it does flash attention's."""
    takes = inspect.signature(model.forward).parameters.values()
    flash, _ = supported_attention(model)
    return flash and any(p.kind == p.VAR_KEYWORD for p in takes)


def goes_without_mask(model: PreTrainedModel, seen: set[str]) -> bool:
    """Whether nothing of what a model's mask says was lost, by what its layers came with.

    Some make masks of their own, and some leave their sliding windows to the mask alone.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = bool(getattr(config, "sliding_window", None)) and "sliding_attention" in layers
    return "mask" not in seen and ("window" in seen or not slides)


AttentionInterface.register(SDPA_DOCUMENTS, attend)
