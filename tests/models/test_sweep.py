"""Right numbers for every causal language model of Transformers, or a refusal by name.

A sample runs here, all of them by `make sweep`, which writes docs/models.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import Tensor

from tests.groups import run_ranks
from tests.models import sweep
from tests.models.tiny import CAUSAL

EVERYTHING = "PSYCHE_FAST_SWEEP" in os.environ
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
ALONE: dict[str, Callable[[Path], None]] = {
    "training in float32": partial(sweep.losses_and_gradients, kind="fp32"),
    "training in bfloat16": partial(sweep.losses_and_gradients, kind="bf16"),
    "rows longer than its positions": sweep.long_rows,
    "checkpoints": sweep.reload,
    "packed documents": sweep.packed,
    "estimate": sweep.estimated,
    "estimate of tensor parallelism": partial(sweep.estimated, tensor_parallelism=2),
}
SPLIT = {"--data-parallelism 2": "fsdp", "--tensor-parallelism 2": "tp"}
SAMPLE = {
    "training in bfloat16": ["codegen", "deepseek_v3"],
    "rows longer than its positions": ["whisper"],
    "checkpoints": ["camembert"],
    "packed documents": ["roberta", "bart"],
    "estimate": ["hrm_text", "jetmoe"],
    "estimate of tensor parallelism": ["deepseek_v3", "apertus"],
    # blocks in blocks, ties into a block, fused files
    "--data-parallelism 2": ["mamba", "roberta", "hrm_text"],
    "--tensor-parallelism 2": ["apertus", "doge", "gemma4"],
}
REFUSED: dict[tuple[str, str], str] = {
    ("rows longer than its positions", "whisper"): "more than the max_target_positions of 64",
    ("packed documents", "roberta"): "counts positions its own way",
    ("packed documents", "bart"): "counts positions its own way",
    ("estimate", "jetmoe"): "cannot be gone through without values, so there is no estimate",
    ("--tensor-parallelism 2", "gemma4"): "embed_tokens.weight, a part, outside of its layer",
    ("--tensor-parallelism 2", "doge"): "cannot compute with a rank's part of its layers",
}
"""Of the sample: a part of the reason."""

CASES = [
    (stage, model_type)
    for stage in [*ALONE, *SPLIT]
    for model_type in (CAUSAL if EVERYTHING else SAMPLE.get(stage, []))
]
TOGETHER = 8  # models that two processes go through


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sweep")

    def find(model_type: str) -> Path:
        place = root / model_type
        if not place.exists():
            sweep.write(model_type, place)
        return place

    return find


@pytest.fixture(scope="session")
def refusals() -> Iterator[dict[tuple[str, str], str]]:
    """What is refused and why; the page takes over each stage that all models have passed."""
    found: dict[tuple[str, str], str] = {}
    yield found
    if EVERYTHING:
        kept = PAGE.read_text() if PAGE.exists() else ""
        PAGE.write_text(page(found, kept))


@pytest.fixture(scope="session")
def traces(folder: Callable[[str], Path]) -> Callable[[str, str], Any]:
    """What two ranks saw of a model; several models by the same two processes."""
    seen: dict[tuple[str, str], Any] = {}
    wanted = [case for case in CASES if case[0] in SPLIT]

    def trace(stage: str, model_type: str) -> Any:
        if (stage, model_type) not in seen:
            at = wanted.index((stage, model_type))
            cases = []
            for kind, name in wanted[at : at + TOGETHER]:
                with suppress(Exception):  # those that cannot be built
                    cases.append((kind, name, folder(name)))
            ranks = run_ranks(both, 2, cases)
            for number, (kind, name, _) in enumerate(cases):
                seen[kind, name] = [rank[number] for rank in ranks]
        return seen.pop((stage, model_type))

    return trace


def both(rank: int, cases: list[tuple[str, str, Path]]) -> list[dict[str, Tensor] | Exception]:
    found: list[dict[str, Tensor] | Exception] = []
    for stage, _, place in cases:
        try:
            found.append(sweep.split(rank, place, SPLIT[stage]))
        except ValueError as error:
            found.append(ValueError(str(error)))
    return found


@pytest.mark.processes
@pytest.mark.parametrize(("stage", "model_type"), CASES)
def test_numbers_are_right_or_refused(
    stage: str, model_type: str, folder: Any, refusals: Any, traces: Any
) -> None:
    why = ""
    try:
        place = folder(model_type)
    except Exception as error:  # not of ours: Transformers' own default cannot be built
        assert EVERYTHING
        why = f"Transformers cannot build it: {error}"
    if not why:
        try:
            if stage in ALONE:
                ALONE[stage](place)
            else:
                found = traces(stage, model_type)
                for rank in found:
                    if isinstance(rank, Exception):
                        raise rank
                sweep.compare_split(found, place)
        except ValueError as error:
            why = str(error)
    refusals[stage, model_type] = general(why)
    if not EVERYTHING:
        wanted = REFUSED.get((stage, model_type), "")
        assert bool(why) == bool(wanted), why
        assert wanted in why


def general(why: str) -> str:
    """A reason without the names that only one model has."""
    why = " ".join(why.split()).replace("|", "/")
    why = re.sub(r"\b\w*[A-Z]\w+(LMHead\w*|For\w+LM|ForConditional\w*)\b", "the model", why)
    return re.sub(r"(?<= )[a-z_]+\.[\w.]+\.(?=\w)", "….", why)[:300]


def page(found: dict[tuple[str, str], str], before: str) -> str:
    """What is refused, a line for each stage and reason; of stages not gone through as before.

    Models that no stage can take, for one reason, have a line of their own.
    """
    lines = [
        "# What is refused",
        "",
        f"Written by `make sweep`, which tries all {len(CAUSAL)} causal language models of",
        f"Transformers {transformers.__version__}, tiny and with random weights: losses and",
        "gradients in float32 and bfloat16 against `from_pretrained`, rows longer than the model's",
        "positions, saving and reloading, packed rows against each document alone, two FSDP2 ranks",
        "and two tensor-parallel ones against one process, estimates. What is not listed has",
        "passed.",
        "",
        "| what | which | why |",
        "| --- | --- | --- |",
    ]
    stages = [*ALONE, *SPLIT]
    whole = [stage for stage in stages if all((stage, name) in found for name in CAUSAL)]
    kept = [line for line in before.splitlines() if line.split(" | ")[0].strip("| ") not in whole]
    always = {
        name: found[whole[0], name]
        for name in CAUSAL
        if len({found[stage, name] for stage in whole}) == 1 and found[whole[0], name]
    }
    if whole != stages:  # what has not been gone through may differ
        always = {n: why for n, why in always.items() if f"| all | {n} | {why} |" in kept}
    lines += [f"| all | {name} | {why} |" for name, why in always.items()]
    for stage in stages:
        if stage not in whole:
            lines += [line for line in kept if line.startswith(f"| {stage} |")]
            continue
        models: dict[str, list[str]] = {}
        for model_type in CAUSAL:
            if (why := found[stage, model_type]) and model_type not in always:
                models.setdefault(why, []).append(model_type)
        lines += [f"| {stage} | {', '.join(names)} | {why} |" for why, names in models.items()]
    return "\n".join(lines) + "\n"
