"""The private names of other packages that are used are there, in every version that is allowed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers

from psyche_fast import compat
from tests.tiny import llama_config


@pytest.mark.parametrize("name", sorted(compat._NAMES))
def test_every_name_is_there(name: str) -> None:
    package = compat._NAMES[name].partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is an extra")
    assert getattr(compat, name) is not None


def test_what_models_say_of_themselves() -> None:
    model = transformers.LlamaForCausalLM(llama_config())
    assert compat.supported_attention(model) == (True, True)
    assert compat.supported_attention(type(model)) == (True, True)
    assert list(compat.block_classes(model) or []) == ["LlamaDecoderLayer"]
    assert compat.block_classes(torch.nn.Linear(1, 1)) is None
    assert list(compat.dtype_plan(model, torch.bfloat16)) == []
    assert compat.ignored_on_load(model) == ([], [])
    compat.set_weight_conversions(model, [1])
    assert compat.weight_conversions(model) == [1]


def test_tensors_that_share_memory_have_one_key() -> None:
    tensor = torch.empty(4, device="meta")
    assert compat.storage_key(tensor) == compat.storage_key(tensor[1:])
    assert compat.storage_key(tensor) != compat.storage_key(torch.empty(4, device="meta"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    name = "Nothing"
    with pytest.raises(AttributeError, match=r"'psyche_fast.compat' has no attribute 'Nothing'"):
        getattr(compat, name)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    script = "import psyche_fast.compat, sys; print({'torch', 'transformers'} & {*sys.modules})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
