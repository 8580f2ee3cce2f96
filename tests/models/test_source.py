"""What `--model` and `--dry-run` tell about a model before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from psyche_fast.models.source import (
    FilesSource,
    TensorsSource,
    check_model,
    resolve_model,
    tensor_shapes,
    weight_files,
)


def test_a_folder_is_summarised_from_its_headers(save_model) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    summary = check_model(resolve_model(str(folder)))
    hidden, mlp, heads = 32, 48, 8
    block = 2 * hidden * hidden + 2 * hidden * 2 * heads + 3 * hidden * mlp + 2 * hidden
    assert summary.model_type == "llama"
    assert summary.num_parameters == 64 * hidden + 2 * block + hidden
    assert summary.num_tensors == 1 + 2 * 9 + 1


def test_home_is_expanded(save_model, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model()
    monkeypatch.setenv("HOME", str(folder.parent))
    source = resolve_model(f"~/{folder.name}")
    assert check_model(source).model_type == "llama"
    files = [f"~/{folder.name}/{path.name}" for path in source.files]
    assert FilesSource.from_strings(files) == source


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./not/there", "no folder './not/there'"),
        ("~/not-there", "no folder '~/not-there'"),
        ("one/two/three", "no hub id"),
        ("nobody/no-such-model", "neither a folder nor downloadable"),
    ],
)
def test_a_model_that_is_nowhere(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        resolve_model(name)
    assert str(caught.value).startswith("--model")
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="wanted a folder or a hub id"):
        resolve_model(str(tmp_path / "file"))


def _fault(folder: Path, fault: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    edited = json.loads(config.read_text())
    match fault:
        case "no config":
            config.unlink()
        case "config is not JSON":
            config.write_text("{")
        case "config is a list":
            config.write_text("[]")
        case "unknown model_type":
            config.write_text(json.dumps({**edited, "model_type": "lama"}))
        case "no model_type":
            del edited["model_type"]
            config.write_text(json.dumps(edited))
        case "no language model":
            config.write_text(json.dumps({**edited, "model_type": "vit"}))
        case "quantised":
            config.write_text(json.dumps({**edited, "quantization_config": {"bits": 4}}))
        case "no weights":
            weights.rename(folder / "pytorch_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbage":
            weights.write_bytes(b"\xff" * 1000)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no config", "no config.json in"),
        ("config is not JSON", "not valid JSON"),
        ("config is a list", "wanted a JSON object, got list"),
        ("unknown model_type", "does not know model_type 'lama'"),
        ("no model_type", "no model_type"),
        ("no language model", "'vit' is no causal language model"),
        ("quantised", "quantised weights cannot be trained"),
        ("no weights", r"no safetensors in .*found pytorch_model.bin"),
        ("truncated", "model.safetensors is no complete safetensors file"),
        ("garbage", "model.safetensors is no complete safetensors file"),
    ],
)
def test_a_faulty_folder_is_one_line(save_model, fault: str, says: str) -> None:
    folder = save_model()
    _fault(folder, fault)
    with pytest.raises(ValueError, match=says) as caught:
        check_model(resolve_model(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(save_model) -> None:
    folder = save_model("llama", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} named by .*index.json missing"):
        check_model(resolve_model(str(folder)))
    # Also where another machine was told of files that it has not.
    told = FilesSource((*resolve_model(str(folder)).files, shards[1]))
    with pytest.raises(ValueError, match=shards[1].name):
        check_model(told)


def test_a_malformed_index(save_model) -> None:
    folder = save_model("llama", max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="no safetensors index"):
        check_model(resolve_model(str(folder)))


def test_other_formats_beside_the_index_are_left_alone(save_model) -> None:
    folder = save_model()
    save_file({"tok.weight": np.zeros((2, 2))}, folder / "consolidated.safetensors")
    source = resolve_model(str(folder))
    assert [path.name for path in weight_files(source)] == ["model.safetensors"]
    assert "tok.weight" not in tensor_shapes(source)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": np.zeros(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"w in .*b.safetensors and in another file"):
        tensor_shapes(resolve_model(str(tmp_path)))


def test_other_architectures_need_no_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"width": 3}')
    save_file({"w": np.zeros((3, 5))}, tmp_path / "model.safetensors")
    summary = check_model(resolve_model(str(tmp_path)), "somewhere:build")
    assert (summary.model_type, summary.num_parameters) == (None, 15)


def test_side_files_are_all_but_weights_and_config(save_model) -> None:
    folder = save_model("llama", max_shard_size="20KB")
    for name in ("tokenizer.json", "chat_template.jinja", "notes.md"):
        (folder / name).write_text("{}")
    names = {path.name for path in resolve_model(str(folder)).side_files}
    assert names == {"tokenizer.json", "chat_template.jinja", "generation_config.json"}


def test_tensors_sources_are_checked_too() -> None:
    tensors = {"w": torch.zeros(2, 3)}
    summary = check_model(TensorsSource('{"model_type": "llama"}', tensors))
    assert summary.num_parameters == 6
    with pytest.raises(ValueError, match="not valid JSON"):
        check_model(TensorsSource("nope", tensors))


def test_finding_a_model_does_not_import_torch(save_model) -> None:
    folder = save_model()
    code = (
        "import sys; from psyche_fast.models.source import resolve_model, tensor_shapes;"
        f"shapes = tensor_shapes(resolve_model({str(folder)!r}));"
        "assert shapes['model.norm.weight'] == (32,), shapes;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
