"""Checkpoints that go to a URL and come back from one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest

from psyche_fast.core.remote import RemoteUploads, fetched, open_remote
from psyche_fast.core.uploads import waited_for
from psyche_fast.data import remote as retries
from psyche_fast.rank import state
from tests.core.test_resume import parameters, same, states
from tests.core.test_run import start, train
from tests.tiny import save_llama, save_tokens

URL = "memory://bucket/run"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.0)
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:06d}"
    (path / state.FOLDER).mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / state.FOLDER / "rank-00000.safetensors").write_bytes(bytes([step]) * 100)
    own = [state.sealed(path / state.FOLDER / "rank-00000.safetensors")]
    manifest = state.Manifest(
        version=state.VERSION, step=step, config={}, data={}, machine={}, files=own,
        model=[state.sealed(path / "config.json")],
    )  # fmt: skip
    state.write_manifest(path / state.FOLDER, manifest)
    return path


def upload(*paths: Path) -> list[str]:
    said: list[str] = []
    for path in paths:
        up = RemoteUploads(URL, said.append)
        with waited_for(up):
            up.push(int(path.name[-6:]), path)
    return [line for line in said if not line.startswith("uploading to")]


def test_what_went_comes_back_and_its_mark_last(files: Any, tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / "run", step) for step in (2, 10)]
    order: list[str] = []
    put = type(files).put_file
    with mock.patch.object(
        type(files), "put_file", lambda s, a, b, **k: (order.append(Path(b).name), put(s, a, b))
    ):
        assert upload(*paths) == [f"checkpoint of step {n} uploaded to {URL}" for n in (2, 10)]
    assert order[2] == order[5] == "manifest.json"
    assert sorted(order[:2]) == ["config.json", "rank-00000.safetensors"]
    files.pipe_file("/bucket/run/step-000011/config.json", b"{}")  # under way, or cut off
    files.pipe_file("/bucket/run/notes/state/manifest.json", b"{}")
    found = list(fetched(URL, tmp_path / "back", "--resume"))
    assert [folder.name for folder in found] == ["step-000010", "step-000002"]
    for folder, path in zip(found, reversed(paths), strict=True):
        state.check_sums(folder, state.read_manifest(folder))
        names = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        for name, content in names.items():
            assert (folder / name).read_bytes() == content
    with mock.patch.object(type(files), "get_file", side_effect=AssertionError("read again")):
        (one,) = fetched(f"{URL}/step-000002", tmp_path / "back", "--resume")
    assert one == found[1]


def test_failures_are_tried_again_then_said(files: Any, tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (1, 2)]
    left = [3]

    def put(self: Any, *arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("the line is dead")
        real(self, *arguments, **options)

    real = type(files).put_file
    with mock.patch.object(type(files), "put_file", put):
        assert upload(paths[0]) == [f"checkpoint of step 1 uploaded to {URL}"]
        left[0] = 1000
        (said,) = upload(paths[1])
    assert said.startswith(f"--checkpoint-to {URL}: checkpoint of step 2 not uploaded: ")
    assert f"the line is dead; tried {retries.ATTEMPTS} times; by hand: copy {paths[1]} to" in said
    assert not files.exists("/bucket/run/step-000002/state/manifest.json")
    (only,) = fetched(URL, tmp_path / "back", "--resume")
    assert only.name == "step-000001"


def test_what_is_written_anew_has_no_mark_meanwhile(files: Any, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    upload(path)
    with mock.patch.object(type(files), "put_file", side_effect=ConnectionError("dead")):
        upload(path)
    with pytest.raises(ValueError, match=f"--resume {URL}: there is no complete checkpoint"):
        list(fetched(URL, tmp_path / "back", "--resume"))


def test_what_is_no_place_for_checkpoints_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("bucket/run", "https://host/run", "nowhere://run"):
        with pytest.raises(ValueError, match=f"^--checkpoint-to {re.escape(url)}: [^\n]+$"):
            open_remote(url, "--checkpoint-to")
    missing = mock.Mock(side_effect=ImportError("Install s3fs to access S3"))
    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3:// needs s3fs: pip install 'psyche-fast\[remote\]'$"):
        open_remote("s3://bucket/run", "--checkpoint-to")


@pytest.mark.processes
def test_a_run_goes_on_from_a_url(tmp_path: Path) -> None:
    """And passes over the checkpoint there that has been damaged on its way."""
    save_llama(tmp_path / "model")
    save_tokens(tmp_path / "data")
    bucket, run = tmp_path / "bucket", tmp_path / "run"
    arguments = ["--checkpoint-every", "2", "--total-steps", "4"]
    train(tmp_path, run, *arguments, "--checkpoint-to", f"file://{bucket}")
    assert sorted(path.name for path in bucket.iterdir()) == ["step-000002", "step-000004"]
    bad = bucket / "step-000004" / "state" / "rank-00000.safetensors"
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    other = tmp_path / "other"
    refused = start(tmp_path, other, *arguments, "--resume", f"file://{tmp_path}/none", "--dry-run")
    assert refused.returncode == 2
    assert "there is no complete checkpoint" in refused.stderr
    result = start(tmp_path, other, *arguments, "--resume", f"file://{bucket}")
    assert result.returncode == 0, result.stderr
    assert f"passed over file://{bucket}/step-000004/state/rank-00000.safetensors is damaged" in (
        result.stderr
    )
    assert "step-000002, from step 3" in result.stderr
    assert same(parameters(other, 4), parameters(run, 4))
    assert same(states(other, 4), states(run, 4))
