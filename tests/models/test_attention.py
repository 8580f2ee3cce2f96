"""The choice of the attention implementation."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from psyche_fast.models import choose_attention, load_model
from psyche_fast.models.source import resolve_model


def _install(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    # None in sys.modules makes the import fail, whatever is installed.
    module = types.ModuleType("flash_attn") if there else None
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [
        ("cpu", True, "sdpa"),
        ("cpu", False, "sdpa"),
        ("cuda", True, "flash_attention_2"),
        ("cuda", False, "sdpa"),
    ],
)
def test_auto(monkeypatch, device: str, there: bool, expected: str) -> None:
    _install(monkeypatch, there)
    assert choose_attention("auto", device) == expected


def test_auto_passes_over_what_an_architecture_has_not(monkeypatch) -> None:
    # Not a module that is no flash_attn: transformers would import from it.
    monkeypatch.setattr("psyche_fast.models.attention._imports", lambda: None)
    assert choose_attention("auto", "cpu", "llama") == "sdpa"
    assert choose_attention("auto", "cuda", "llama") == "flash_attention_2"
    assert choose_attention("auto", "cuda", "gptj") == "flash_attention_2"
    assert choose_attention("auto", "cpu", "gptj") == "eager"
    assert choose_attention("auto", "cpu", "their_own") == "sdpa"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_what_is_asked_for_is_taken(name: str) -> None:
    assert choose_attention(name, "cuda") == name


def test_flash_attention_where_it_cannot_run(monkeypatch) -> None:
    _install(monkeypatch, False)
    with pytest.raises(ValueError, match=r"pip install 'psyche-fast\[flash-attn\]'"):
        choose_attention("flash_attention_2", "cuda")
    _install(monkeypatch, True)
    assert choose_attention("flash_attention_2", "cuda") == "flash_attention_2"
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        choose_attention("flash_attention_2", "cpu")


def test_an_unknown_value_lists_the_known() -> None:
    with pytest.raises(ValueError, match="auto, eager, sdpa, flash_attention_2, got 'fast'"):
        choose_attention("fast", "cpu")


def test_an_architecture_without_the_implementation(save_model) -> None:
    source = resolve_model(str(save_model("gptj", n_embd=32, n_layer=1, n_head=4)))
    with pytest.raises(ValueError, match="gptj cannot be built with --attn-implementation sdpa"):
        load_model(source, device=torch.device("cpu"), attn_implementation="sdpa")


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_model_runs_what_was_chosen(save_model, name: str) -> None:
    source = resolve_model(str(save_model()))
    model = load_model(source, device=torch.device("cpu"), attn_implementation=name)
    assert model.attn_implementation == name
    assert model.module.config._attn_implementation == name
