"""The choice of the attention implementation: once, by rank 0, and the same on every rank."""

from __future__ import annotations

from importlib import import_module

from psyche_fast import compat

IMPLEMENTATIONS = ("auto", "eager", "sdpa", "flash_attention_2")


def choose_attention(requested: str, device_type: str, model_type: str | None = None) -> str:
    """Turns `--attn-implementation` into the one that runs.

    Args:
        requested: one of `IMPLEMENTATIONS`. `auto` is `flash_attention_2` where
            `flash_attn` imports and the device is CUDA, else `sdpa` (PyTorch's own, which has
            flash kernels too).
        device_type: `cpu` or `cuda`.
        model_type: Transformers' name of the architecture; where it is given, `auto` passes over
            what that architecture has not (GPT-J, for one, has no sdpa).

    Returns:
        `eager`, `sdpa` or `flash_attention_2`.

    Raises:
        ValueError: an unknown value, or flash attention where it cannot run.
    """
    if requested not in IMPLEMENTATIONS:
        raise ValueError(
            f"--attn-implementation: wanted one of {', '.join(IMPLEMENTATIONS)}, got {requested!r}"
        )
    if requested == "auto":
        flash, sdpa = _supported(model_type)
        if flash and device_type == "cuda" and _imports() is None:
            return "flash_attention_2"
        return "sdpa" if sdpa else "eager"
    if requested == "flash_attention_2":
        if device_type != "cuda":
            raise ValueError(
                f"--attn-implementation flash_attention_2 needs a CUDA device, got {device_type}"
            )
        problem = _imports()
        if problem is not None:
            raise ValueError(
                "--attn-implementation flash_attention_2 needs the flash_attn package: "
                f"pip install 'psyche-fast[flash-attn]' ({problem})"
            )
    return requested


def _supported(model_type: str | None) -> tuple[bool, bool]:
    """Whether the architecture has flash attention and sdpa."""
    if model_type is None:
        return True, True
    try:
        model = compat.MODEL_FOR_CAUSAL_LM_MAPPING[compat.CONFIG_MAPPING[model_type]]
    except KeyError:  # not one of Transformers': it is the model's own affair
        return True, True
    return compat.supported_attention(model)


def _imports() -> str | None:
    try:
        import_module("flash_attn")
    except ImportError as error:  # not installed, or built for another torch
        return str(error)
    return None
