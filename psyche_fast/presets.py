"""`--preset`: settings for models of common sizes and for links of three kinds.

Each says where its numbers come from. They go under `--config` and flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from psyche_fast.locations import FRESH

_GPT3 = "learning rate and batch: Brown et al. 2020 (arXiv 2005.14165), table 2.1"
_TOKENS = "tokens: 20 to a parameter, Hoffmann et al. 2022 (arXiv 2203.15556)"
_COSINE = "cosine to a tenth, weight decay 0.1, clipping at 1: Brown et al. 2020, appendix B"


@dataclass(frozen=True)
class Preset:
    """Settings that belong together.

    Attributes:
        what: in a line.
        values: by the flags' names.
        sources: where they come from.
        shape: of a Llama, as `transformers.LlamaConfig` has it; None for a link's.
    """

    what: str
    values: Mapping[str, Any]
    sources: tuple[str, ...]
    shape: Mapping[str, int] | None = None


def _llama(
    hidden: int, mlp: int, layers: int, heads: int, key_values: int | None = None
) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_values or heads,
    }  # fmt: skip


def _model(name: str, batch: int, rate: float, tokens: int, length: int = 2048) -> dict[str, Any]:
    return {
        "model": FRESH + name, "sequence_length": length, "total_batch": batch,
        "micro_batch": 0, "learning_rate": rate, "total_tokens": tokens, "warmup_fraction": 0.02,
    }  # fmt: skip


PRESETS: Mapping[str, Preset] = {
    "20M": Preset(
        "a Llama of 20 million parameters, for one GPU or a patient CPU",
        _model("20M", 128, 4e-4, 400_000_000, 512),
        (
            "learning rate and sequence length: Psyche's llama2-20m-fineweb run",
            "batch of 65 k tokens: our own choice, between that run and GPT-3 Small",
            _TOKENS, _COSINE,
        ),
        _llama(384, 1024, 4, 6),
    ),
    "125M": Preset(
        "a Llama in the shape of GPT-3 Small",
        _model("125M", 256, 6e-4, 2_500_000_000),
        (_GPT3, _TOKENS, _COSINE),
        _llama(768, 2048, 12, 12),
    ),
    "350M": Preset(
        "a Llama in the shape of GPT-3 Medium",
        _model("350M", 256, 3e-4, 7_000_000_000),
        (_GPT3, _TOKENS, _COSINE),
        _llama(1024, 2752, 24, 16),
    ),
    "1B": Preset(
        "a Llama in the shape of Llama 3.2 1B",
        _model("1B", 512, 2e-4, 20_000_000_000),
        (_GPT3 + " (1.3B)", "shape: Llama-3.2-1B's config.json", _TOKENS, _COSINE),
        _llama(2048, 8192, 16, 32, 8),
    ),
    "slow": Preset(
        "between sites: 10 to 100 Mbit/s, 100 ms and more",
        {
            "method": "sparseloco", "every": 30, "topk": 64, "beta": 0.95, "values": "2bit",
            "outer_rate": 1.0,
        },
        (
            "rounds of 30 steps, 64 of 4096, decay 0.95, outer rate 1, 2 bits: the Covenant-72B "
            "run with SparseLoCo (arXiv 2508.15706)",
            "2.8 bytes per 4096 parameters and step, counted on the wire",
        ),
    ),
    "medium": Preset(
        "between data centres: 100 Mbit/s to 10 Gbit/s, up to 100 ms",
        {
            "distro": True, "distro_quantization": True, "compression_chunk": 64,
            "compression_topk": 4, "compression_decay": 0.995,
        },
        (
            "4 of 64 x 64, decay 0.995, 1 bit: Psyche's consilience-40b run",
            "6.4 bytes per 4096 parameters and step, counted on the wire; the exchange hides "
            "behind the next step",
        ),
    ),
    "fast": Preset(
        "in one data centre: 10 Gbit/s and more, below 1 ms",
        {"method": "dense"},
        ("the mean of all gradients in bf16, the baseline that everything is compared with",),
    ),
}  # fmt: skip

_LINKS = ("slow", "medium", "fast")


def values_of(names: Iterable[str], over: Iterable[str]) -> dict[str, Any]:
    """What presets set together.

    Args:
        names: the presets', one for a model and one for a link at most.
        over: names of the flags that are given besides.

    Raises:
        ValueError: there is none of that name, or two of one kind.
    """
    values: dict[str, Any] = {}
    kinds: dict[bool, str] = {}
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"--preset {name}: there are {', '.join(PRESETS)}")
        other = kinds.setdefault(name in _LINKS, name)
        if other != name:
            kind = "link" if name in _LINKS else "model"
            raise ValueError(f"--preset {other} and --preset {name}: give one for the {kind}")
        values |= PRESETS[name].values
    chosen = sorted({"method", "distro"} & set(over))
    if True in kinds and chosen:
        raise ValueError(f"--preset {kinds[True]} and --{chosen[0]} both say how replicas learn")
    return values


def fresh_shape(name: str) -> Mapping[str, int]:
    """The shape of `fresh:NAME`'s model.

    Raises:
        ValueError: there is none of that name.
    """
    shapes = {known: preset.shape for known, preset in PRESETS.items() if preset.shape}
    if name not in shapes:
        raise ValueError(f"--model {FRESH}{name}: there are {', '.join(FRESH + n for n in shapes)}")
    return shapes[name]
