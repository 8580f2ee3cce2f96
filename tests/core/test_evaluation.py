"""Held-out loss, bits per byte and samples: what they are, and that training does not notice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from psyche_fast.config import RunConfig
from psyche_fast.core.evaluation import Evaluation, Held
from psyche_fast.core.plan import make_plan
from psyche_fast.data import (
    DummyDataset,
    bytes_of_tokens,
    load_tokenizer,
    tokenize_files,
    train_tokenizer,
)
from psyche_fast.metrics import PhaseTimer
from tests.core.test_resume import parameters, same, start, states, train, without_later
from tests.core.test_run import DISTRO
from tests.tiny import save_llama

TEXT = "für jeden Schritt: ä = ß + ñ; if x: return y\n"
EVALUATED = ["--eval-every", "2", "--eval-sequences", "7"]
SAMPLED = ["--samples-every", "3", "--sample-prompt", "if x", "--sample-prompt", "für",
           "--sample-tokens", "9"]  # fmt: skip
WORLDS = {
    "DisTrO 2x2": ([*DISTRO, "--replicas", "2", "--data-parallelism", "2"], 4),
    "DiLoCo 2": (["--method", "diloco", "--every", "2", "--replicas", "2"], 2),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name, size in (("data", 900), ("held", 60)):
        words = rng.permutation(TEXT.split(" ") * size)
        (folder / f"{name}.txt").write_text(" ".join(words))
    tokenizer = train_tokenizer([TEXT * 9], 300)
    for name in ("data", "held"):
        tokenize_files([folder / f"{name}.txt"], tokenizer, folder / name, progress=False)
    # Dropout draws random numbers.
    save_llama(folder / "model", vocab_size=320, attention_dropout=0.1)
    tokenizer.save_pretrained(folder / "model")
    return folder


def oracle(place: Path, checkpoint: Path) -> tuple[float, float]:
    """Loss and bits per byte in float64, and of the text that the tokens are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    tokenizer = load_tokenizer(place / "model")
    tokens = np.fromfile(place / "held" / "tokens-00000.bin", dtype="<u2").astype(np.int64)
    total = count = size = 0.0
    for row in torch.from_numpy(tokens[: 7 * 32]).view(7, 32):
        with torch.no_grad():
            logits = model(row[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
        count += 31
        # Bytes of a letter may be cut apart, which `decode` would show as another letter.
        size += sum(len(t) for t in tokenizer.convert_ids_to_tokens(row[1:].tolist()))
    return total / count, total / math.log(2) / size


@pytest.mark.processes
@pytest.mark.parametrize("name", WORLDS)
def test_what_is_held_out_is_evaluated_without_a_trace(
    name: str, place: Path, tmp_path: Path
) -> None:
    given, ranks = WORLDS[name]
    given = [*given, "--checkpoint-every", "4", "--total-steps", "5"]
    shown = [*given, "--eval-data", str(place / "held"), *EVALUATED, *SAMPLED]
    blind = train(place, tmp_path / "blind", *given, ranks=ranks)
    lines = train(place, tmp_path / "run", *shown, ranks=ranks)
    assert [m["loss"] for m in lines] == [m["loss"] for m in blind]
    assert same(states(tmp_path / "run", 5), states(tmp_path / "blind", 5))
    assert [m["step"] for m in lines if "eval_loss" in m] == [1, 2, 4, 5]
    for m in lines:
        if m["step"] >= 4:
            checkpoint = tmp_path / "run" / "checkpoints" / f"step-{m['step']:06d}"
            loss, bits = oracle(place, checkpoint)
            assert m["eval_loss"] == pytest.approx(loss, rel=2e-6)
            assert m["eval_bits_per_byte"] == pytest.approx(bits, rel=2e-6)
            assert m["seconds"]["evaluate"] > 0
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (3, "if x"), (3, "für"), (5, "if x"), (5, "für"),
    ]  # fmt: skip
    assert all(s["text"].startswith(s["prompt"]) and s["text"] != s["prompt"] for s in samples)
    assert lines[2]["samples"] == [{k: s[k] for k in ("prompt", "text")} for s in samples[:2]]
    part = without_later(tmp_path / "run", tmp_path / "part", 4)
    result = start(place, part, *shown, "--resume", "auto", ranks=ranks)
    assert result.returncode == 0, result.stderr
    again = read(part / "metrics.jsonl")
    for known in ("loss", "eval_loss", "eval_bits_per_byte", "samples"):
        assert [m.get(known) for m in again] == [m.get(known) for m in lines]
    assert read(part / "samples.jsonl") == samples
    assert same(parameters(part, 5), parameters(tmp_path / "blind", 5))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plan_of(place: Path, **flags: Any) -> Any:
    given = {"sequence_length": 32, "param_dtype": "float32", "device": "cpu", "total_batch": 4}
    return make_plan(
        RunConfig.of(
            model=str(place / "model"), data_path=str(place / "data"), **{**given, **flags}
        )
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"eval_every": 2}, "--eval-every needs --eval-data"),
        ({"samples_every": 2}, "--samples-every needs --sample-prompt"),
        ({"sample_prompt": ("x",)}, "--sample-prompt needs --samples-every"),
        ({"samples_every": 2, "sample_prompt": ("",)}, "--sample-prompt must not be empty"),
        ({"samples_every": 2, "sample_prompt": ("x",), "sample_tokens": 32},
         "--sample-prompt 'x' has 1 tokens, wanted 1 to 0"),
        ({"eval_data": "nowhere"}, "no such file or directory: nowhere (--eval-data)"),
        ({"eval_data": "dummy:", "eval_sequences": 0}, "has no end"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_by_its_flag(
    place: Path, flags: dict[str, Any], said: str
) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        plan_of(place, **flags)
    assert said in str(error.value)


def test_without_a_tokenizer_there_is_a_loss_and_no_sample(place: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "model", vocab_size=320)
    (tmp_path / "held.bin").write_bytes((place / "held" / "tokens-00000.bin").read_bytes())
    alone = {"model": str(tmp_path / "model"), "data_path": str(tmp_path / "held.bin")}
    common = {"sequence_length": 32, "device": "cpu", "total_batch": 4, **alone}
    plan = make_plan(RunConfig.of(eval_data=alone["data_path"], **common))
    assert plan.held.token_bytes is None
    assert any("no bits per byte: no tokenizer in" in line for line in plan.summary)
    with pytest.raises(ValueError, match="--samples-every: no tokenizer in"):
        make_plan(RunConfig.of(samples_every=1, sample_prompt=("x",), **common))


def metaspace() -> transformers.PreTrainedTokenizerFast:
    """As SentencePiece's with bytes for what it does not know."""
    words = {"<s>": 0, "</s>": 1, "▁if": 2, "▁": 3, "ü": 4}
    words |= {f"<0x{n:02X}>": 5 + n for n in range(256)}
    model = tokenizers.models.BPE(words, [], byte_fallback=True, unk_token="<s>")
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


def test_bytes_of_tokens_are_those_of_their_text(place: Path) -> None:
    own = load_tokenizer(place / "model")
    counts = bytes_of_tokens(own)
    assert counts is not None
    text = TEXT + "日本 \U0001f600"
    assert counts[own(text, add_special_tokens=False).input_ids].sum() == len(text.encode())
    assert counts[own.eos_token_id] == 0
    other = bytes_of_tokens(metaspace())
    assert other is not None
    assert other[[0, 1, 2, 3, 4, 5, 260]].tolist() == [0, 0, 3, 1, 2, 1, 1]
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}))
    words.decoder = tokenizers.decoders.WordPiece()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]")
    assert bytes_of_tokens(wrapped) is None


@pytest.mark.parametrize(
    ("resumed", "evaluated"), [(False, [4, 6, 9]), (True, [6, 9])], ids=["new", "resumed"]
)
def test_the_first_and_the_last_step_are_evaluated_wherever_the_run_ends(
    resumed: bool, evaluated: list[int], tmp_path: Path
) -> None:
    config = RunConfig.of(
        model="m", data_path="d", eval_data="e", eval_every=3, total_steps=400, start_step=4,
        resume="auto" if resumed else None, output=str(tmp_path), micro_batch=1,
    )  # fmt: skip
    trainer = cast("Any", SimpleNamespace(topology=SimpleNamespace(dp=1)))
    held = Held(DummyDataset(8), sequences=1)
    seen = []
    with (
        Evaluation(held, config, trainer, PhaseTimer(), tmp_path, None) as evaluation,
        mock.patch.object(Evaluation, "_evaluate", return_value={"eval_loss": 1.0}),
    ):
        assert evaluation.longest == 0
        for step in range(4, 10):  # as where its time is over with the ninth
            if evaluation.after(step, last=step == 9):
                seen.append(step)
                assert evaluation.longest > 0, "the end would not leave the time for it"
    assert seen == evaluated
