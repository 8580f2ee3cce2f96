"""What the environment says of networks, checked before anybody waits on it."""

from __future__ import annotations

import socket

import pytest

from psyche_fast.start.network import check_interfaces


def test_an_interface_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [name for _, name in socket.if_nameindex()]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{own[0]},nowhere0")
    with pytest.raises(ValueError, match=f"GLOO_SOCKET_IFNAME=.*'nowhere0', only {own[0]}.*unset"):
        check_interfaces()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", own[0])
    check_interfaces()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    check_interfaces()
