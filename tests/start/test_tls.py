"""TLS of gloo: asked for and not there is one line; what users of several machines are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from psyche_fast.start import tls


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    for name in ("key", "cert", "ca"):
        (tmp_path / name).touch(0o600)
    return str(tmp_path / "key"), str(tmp_path / "cert"), str(tmp_path / "ca")


def test_three_files_or_none(files: tuple[str, str, str]) -> None:
    assert tls.variables(None, None, None) == {}
    assert tls.variables(*files) == {
        "GLOO_DEVICE_TRANSPORT": "TCP_TLS",
        "GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY": files[0],
        "GLOO_DEVICE_TRANSPORT_TCP_TLS_CERT": files[1],
        "GLOO_DEVICE_TRANSPORT_TCP_TLS_CA_FILE": files[2],
    }
    for missing, flag in enumerate(("--tls-key", "--tls-cert", "--tls-ca")):
        some = [None if at == missing else file for at, file in enumerate(files)]
        with pytest.raises(ValueError, match=f"{flag} is missing: .* go together"):
            tls.variables(*some)
        gone = [file + "x" if at == missing else file for at, file in enumerate(files)]
        with pytest.raises(ValueError, match=f"{flag} .*: No such file"):
            tls.variables(*gone)
    Path(files[0]).chmod(0o644)
    with pytest.raises(ValueError, match=r"--tls-key .*: others than its owner may read"):
        tls.variables(*files)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, None),
        ("makeDeviceForHostname(): unsupported gloo device", "has no TLS; leave them out, and"),
        ("[tls/context.cc:60] no start line\nmore", r"--tls-ca: \[tls/.*:60\] no start line$"),
    ],
)  # fmt: skip
def test_gloo_is_asked_before_anything_starts(
    said: str | None, why: str | None, files: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def create_device(hostname: str) -> object:
        seen.append(os.environ.get("GLOO_DEVICE_TRANSPORT"))
        if said is not None:
            raise RuntimeError(said)
        return object()

    monkeypatch.setattr(dist.ProcessGroupGloo, "create_device", create_device)
    if why is None:
        tls.check(*files)
    else:
        with pytest.raises(ValueError, match=why):
            tls.check(*files)
    assert seen == ["TCP_TLS"]
    assert "GLOO_DEVICE_TRANSPORT" not in os.environ
    tls.check(None, None, None)
    assert len(seen) == 1


def test_this_builds_gloo_takes_files_or_says_that_it_has_none(
    files: tuple[str, str, str],
) -> None:
    """Empty files are no keys, so that either answer is a refusal; none is a crash."""
    with pytest.raises(ValueError, match="--tls-key, --tls-cert, --tls-ca: "):
        tls.check(*files)
