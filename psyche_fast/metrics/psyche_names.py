"""The names that Psyche's own clients log under, for `--metric-names psyche`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from psyche_fast.metrics.trackers import flatten

_STEPS = 16


class PsycheNames:
    """Turns lines of `metrics.jsonl` into what a Psyche client sends to its dashboards.

    `train/loss`, `train/perplexity`, `train/confidence`, `train/lr`, `train/total_tokens`,
    `train/tokens_per_sec`, `train/global_token_batch_size`, `train/efficency` (so spelled) and
    `coordinator/num_clients` are computed as there: rate and efficiency, the share of a step that
    is training, over the last 16 steps; confidence is 1 - loss / log2(vocabulary). What Psyche has
    no name for keeps ours, norms of `--optim-stats` too: Psyche's `optim/` are sums of magnitudes.
    There is nothing to tell of its `coordinator/epoch` and `round`, `eval/` and `p2p/`.

    Args:
        clients: replicas.
        vocabulary: token ids that the model knows; None where nobody says.
    """

    def __init__(self, clients: int, vocabulary: int | None) -> None:
        self._clients, self._vocabulary = clients, vocabulary
        self._last: deque[tuple[float, float, float]] = deque(maxlen=_STEPS)

    def __call__(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """A line's scalars by Psyche's names."""
        ours = flatten(metrics)
        names: dict[str, float] = {}
        loss = ours.pop("loss", None)
        if loss is not None:
            names["train/loss"] = loss
            if loss < math.log(1e300):
                names["train/perplexity"] = math.exp(loss)
            if self._vocabulary is not None and self._vocabulary > 1:
                names["train/confidence"] = 1.0 - loss / math.log2(self._vocabulary)
        for name, theirs in (("learning_rate", "train/lr"), ("num_tokens", "train/total_tokens")):
            if name in ours:
                names[theirs] = ours.pop(name)
        rate = ours.pop("tokens_per_second", None)
        if rate is not None:
            seconds = ours["step_seconds"]
            tokens = float(round(rate * seconds))
            self._last.append((tokens, seconds, ours.get("seconds/train", 0.0)))
            tokens_of_all, seconds_of_all, train = map(sum, zip(*self._last, strict=True))
            names["train/tokens_per_sec"] = tokens_of_all / seconds_of_all
            names["train/global_token_batch_size"] = tokens
            names["train/efficency"] = train / seconds_of_all
        names["coordinator/num_clients"] = float(self._clients)
        return {**names, **ours}
