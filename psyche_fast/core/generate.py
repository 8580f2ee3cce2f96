"""Text from a run's newest checkpoint, or any model: what `psyche-fast generate` does.

Plain Transformers, as whoever uses a checkpoint would do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from psyche_fast.core.checkpoints import step_of
from psyche_fast.data import load_tokenizer
from psyche_fast.devices import multiplies_bf16


def find_model(place: str) -> str:
    """The model that a name stands for: a run's newest checkpoint, a folder, or a hub id.

    Raises:
        ValueError: a folder without a model.
    """
    path = Path(place)
    if not path.exists():
        looks_local = place.startswith((".", "/", "~")) or place.count("/") > 1
        if looks_local:
            raise ValueError(f"there is no folder {place}: wanted a run, a checkpoint or a model")
        return place
    if (path / "config.json").is_file():
        return str(path)
    steps = {
        step_of(one): one for one in path.glob("checkpoints/*") if (one / "config.json").is_file()
    }
    known = [step for step in steps if step is not None]
    if not known:
        raise ValueError(f"{place} has no config.json, and no checkpoint in `checkpoints`")
    return str(steps[max(known)])


def continued(
    model: str,
    prompts: Sequence[str],
    *,
    tokenizer: str | None = None,
    tokens: int = 64,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[str]:
    """Continues prompts.

    Args:
        model: a folder or hub id.
        prompts: texts, each continued as if it were the only one.
        tokenizer: a folder or hub id; None for the model's own.
        tokens: to add at most.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_p: only of the likeliest tokens with this share, together.
        seed: of sampling.
        device: where to compute.

    Yields:
        Each prompt with what follows it.

    Raises:
        ValueError: no such model or tokenizer, or an empty prompt.
    """
    try:
        words = load_tokenizer(tokenizer or model)
    except ValueError as error:
        if tokenizer is not None:
            raise ValueError(f"--tokenizer: {error}") from error
        raise ValueError(f"{error}; name one with --tokenizer") from error
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        if loaded.dtype == torch.bfloat16 and not multiplies_bf16(torch.device(device).type):
            loaded.float()  # the same numbers, whose products torch does not emulate
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load a model from {model}: {reason}") from error
    loaded.to(device).eval()
    # What a model's own files say of sampling would go over some of these, and warn of others.
    options = transformers.GenerationConfig(
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        pad_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
        **({"temperature": temperature, "top_p": top_p} if temperature > 0 else {}),
    )
    for prompt in prompts:
        ids = words(prompt, return_tensors="pt").input_ids.to(device)
        if not ids.numel():
            raise ValueError(f"--prompt {prompt!r} has no token")
        torch.manual_seed(seed)
        output = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=options
        )
        yield str(words.decode(output[0], skip_special_tokens=True))
