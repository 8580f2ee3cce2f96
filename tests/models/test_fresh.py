"""`--model dummy:`, and revisions of models on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from psyche_fast.data import open_dataset
from psyche_fast.models.source import check_model, read_config, read_model, resolve_model
from tests.tiny import save_llama


def test_the_dummy_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = resolve_model("dummy:")
    summary = check_model(source, "HfAuto")
    assert (summary.model_type, summary.config["vocab_size"]) == ("llama", 32000)
    weights = source.named("model.safetensors")
    assert weights is not None
    before = weights.stat()
    assert resolve_model("dummy:") == source
    assert weights.stat() == before
    assert [path.name for path in (tmp_path / "psyche_fast").iterdir()] == ["dummy-model-1"]


def test_the_configuration_of_a_fresh_model_is_had_without_making_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = read_model("fresh:20M")
    assert list(tmp_path.iterdir()) == []
    made = read_config(resolve_model("fresh:20M"))
    written = {"dtype", "transformers_version"}  # by what saves
    assert {k: v for k, v in read.items() if k not in written} == {
        k: v for k, v in made.items() if k not in written
    }
    with pytest.raises(ValueError, match="--model fresh:7B: there are fresh:20M"):
        read_model("fresh:7B")


def test_fresh_models_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = resolve_model("fresh:20M")
    assert 19e6 < check_model(source).num_parameters < 21e6
    assert resolve_model("fresh:20M") == source
    with pytest.raises(ValueError, match="--model fresh:7B: there are fresh:20M, fresh:125M"):
        resolve_model("fresh:7B")


def test_dummy_data_have_no_end() -> None:
    dataset = open_dataset("dummy:", sequence_length=5)
    samples = dataset.get_samples(10**15, 10**15 + 1)
    assert [s.input_ids.tolist() for s in samples] == [[0] * 5] * 2
    assert all(s.labels is s.input_ids for s in samples)
    dataset.check_vocabulary(1)


def test_a_revision_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    asked: list[tuple[str, Any]] = []

    def snapshot_download(name: str, *, revision: str | None = None, **_: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for model in ("owner/name", "owner/name@cf48eac", "name@refs/pr/3"):
        assert resolve_model(model).named("config.json") == tmp_path / "config.json"
    assert asked == [("owner/name", None), ("owner/name", "cf48eac"), ("name", "refs/pr/3")]
    with pytest.raises(ValueError, match="no folder 'owner/name@a b', and it is no hub id"):
        resolve_model("owner/name@a b")
