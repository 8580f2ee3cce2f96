"""`psyche-fast generate`: text of a run's newest checkpoint, or of any model."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from psyche_fast import cli
from psyche_fast.core.generate import find_model
from psyche_fast.data import train_tokenizer
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    newest = run / "checkpoints" / "step-000010"
    save_llama(newest, vocab_size=320)
    train_tokenizer(["for x in y:\n    print(x)\n" * 9], 300).save_pretrained(newest)
    shutil.copytree(newest, run / "checkpoints" / "step-000009")
    (run / "checkpoints" / "step-000011").mkdir()  # is being written
    return run


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["generate", *arguments, "--device", "cpu"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_greedy_text_is_that_of_the_newest_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = place / "checkpoints" / "step-000010"
    arguments = [str(place), "--prompt", "for x", "--temperature", "0", "--max-new-tokens", "7"]
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert f"checkpoint  {newest}\n" in err
    tokenizer = transformers.AutoTokenizer.from_pretrained(newest)
    model = transformers.AutoModelForCausalLM.from_pretrained(newest)
    ids = tokenizer("for x", return_tensors="pt").input_ids
    for _ in range(7):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_prompts_of_standard_input_and_seeds(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"for x\n\nprint\n")))
        status, out, _ = run(capsys, str(place), "--seed", seed, "--temperature", "5")
        assert status == 0
        said.append(out)
    assert said[0].startswith("--- 'for x' ---\nfor x")
    assert "\n--- 'print' ---\nprint" in said[0]
    assert said[0] == said[1] != said[2]


def test_what_is_no_model_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, wanted in (
        ([str(tmp_path / "none"), "--prompt", "x"], "there is no folder"),
        ([str(tmp_path), "--prompt", "x"], "has no config.json, and no checkpoint"),
        ([str(place), "--prompt", ""], "wanted --prompt TEXT"),
        ([str(save_llama(tmp_path / "bare")), "--prompt", "x"], "name one with --tokenizer"),
        ([str(place), "--prompt", "x", "--tokenizer", str(tmp_path / "bare")], "--tokenizer: "),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2, err
        assert wanted in err.splitlines()[-1]
    assert find_model("owner/name") == "owner/name"
