"""Addresses and interfaces: where the core listens, and which way other ranks are reached."""

from __future__ import annotations

import os
import socket

import psutil


def listen(host: str, port: int) -> socket.socket:
    """Opens the store's listening socket, bound to `host` alone (TCPStore would bind to all).

    Raises:
        ValueError: the port is in use or the address is not this machine's.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, proto, _, address = infos[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror}"
        ) from error
    return sock


def tcp_url(host: str, port: int) -> str:
    """`tcp://HOST:PORT`, with brackets around an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def use_interface(host: str) -> None:
    """Keeps gloo and NCCL on the interface through which `host` is reached.

    gloo would take the one that this machine's name resolves to, which on machines with several
    networks, or none by that name, is another one. What the user has set stays.

    Args:
        host: rank 0's address; on rank 0 one of its own. All addresses (`0.0.0.0`) say
            nothing.
    """
    name = interface(host)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if name not in ("lo", "lo0"):  # inside one machine NCCL needs none
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def check_interfaces() -> None:
    """Checks that gloo is told of interfaces that exist; its own words do not name the setting.

    Raises:
        ValueError: `GLOO_SOCKET_IFNAME` names another one.
    """
    own = [name for _, name in socket.if_nameindex()]
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, wanted.split(",")):
        if name not in own:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={wanted}: this machine has no interface {name!r}, only "
                f"{', '.join(own)}; name one of these or unset it"
            )


def interface(host: str) -> str | None:
    """The interface by which `host` is reached; None of no way, and of all addresses."""
    if host in ("0.0.0.0", "::", ""):
        return None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return None  # whoever connects in earnest says so
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    return None
