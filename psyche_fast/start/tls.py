"""TLS for what gloo sends between ranks, where torch was built with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRANSPORT = "GLOO_DEVICE_TRANSPORT"
_FILES = {
    "tls_key": "GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY",
    "tls_cert": "GLOO_DEVICE_TRANSPORT_TCP_TLS_CERT",
    "tls_ca": "GLOO_DEVICE_TRANSPORT_TCP_TLS_CA_FILE",
}
FLAGS = tuple(_FILES)
"""The options: this machine's key, its certificate, and the certificate of who has signed all."""

IN_CLEAR = (
    "warning  results travel in clear between machines: run in a VPN such as WireGuard, or give "
    "--tls-key, --tls-cert and --tls-ca where torch's gloo has TLS"
)
"""What users of several machines are told that do neither."""


def variables(key: str | None, cert: str | None, ca: str | None) -> dict[str, str]:
    """Environment variables by which gloo takes up TLS; none where there are no files.

    Raises:
        ValueError: one of the three is missing, or cannot be read, or others may read the key.
    """
    files = dict(zip(_FILES, (key, cert, ca), strict=True))
    given = {name: file for name, file in files.items() if file is not None}
    if not given:
        return {}
    for name in _FILES:
        flag = "--" + name.replace("_", "-")
        if name not in given:
            raise ValueError(f"{flag} is missing: --tls-key, --tls-cert and --tls-ca go together")
        try:
            mode = Path(given[name]).stat().st_mode
            Path(given[name]).read_bytes()
        except OSError as error:
            raise ValueError(f"{flag} {given[name]}: {error.strerror}") from error
        if name == "tls_key" and mode & 0o077:
            raise ValueError(
                f"{flag} {given[name]}: others than its owner may read or write it: chmod 600"
            )
    paths = {_FILES[name]: str(Path(file).absolute()) for name, file in given.items()}
    return {_TRANSPORT: "TCP_TLS", **paths}


def check(key: str | None, cert: str | None, ca: str | None) -> None:
    """Checks that gloo takes the files, if there are any; by making a device with them.

    Raises:
        ValueError: those of `variables`; or gloo has no TLS here, or refuses them.
    """
    wanted = variables(key, cert, ca)
    if not wanted:
        return
    import torch
    import torch.distributed as dist

    with _set(wanted):
        try:
            dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            if "unsupported gloo device" in said:
                said = f"the gloo of torch {torch.__version__} has no TLS; leave them out, and use "
                said += "a VPN such as WireGuard between machines"
            raise ValueError(f"--tls-key, --tls-cert, --tls-ca: {said}") from error


@contextmanager
def _set(wanted: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
