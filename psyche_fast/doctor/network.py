"""The network: names, interfaces, ports, and the way to another machine."""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil

from psyche_fast.doctor.finding import Finding, ok, problem, warning
from psyche_fast.doctor.software import reaches
from psyche_fast.start import network, probe

_PORT = 34567
"""That of docs/running.md's commands for several machines."""
_MOST_SKEW = 1.0
"""Seconds between two clocks that nobody minds."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def interfaces() -> Iterator[Finding]:
    """Whether ranks of this machine reach each other, and others by which way."""
    try:
        with closing(network.listen("127.0.0.1", 0)) as here:
            refused = reaches("127.0.0.1", here.getsockname()[1], 2.0)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        yield problem(
            "loopback",
            f"127.0.0.1: {refused}",
            "ip link set lo up, by root: all ranks of a machine meet there",
        )
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = _addresses(up)
    families = {version for _, version in addresses}
    shown = ", ".join(f"{name} {address}" for (name, _), address in addresses.items())
    if not addresses:
        yield warning("interfaces", "none but loopback", "right for runs on this machine alone")
    elif families == {6}:
        yield warning(
            "interfaces",
            f"{shown}: IPv6 alone",
            "name machines by addresses, --host ADDRESS, where their names lead to IPv4 ones",
        )
    else:
        yield ok("interfaces", shown)
    yield from _chosen()


def _addresses(up: set[str]) -> dict[tuple[str, int], str]:
    """The first address of each interface by IP version, link-local ones and loopback left out."""
    found: dict[tuple[str, int], str] = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries if name in up else ():
            try:
                address = ipaddress.ip_address(entry.address.partition("%")[0])
            except ValueError:  # of the link layer
                continue
            if not address.is_loopback and not address.is_link_local:
                found.setdefault((name, address.version), str(address))
    return found


def _chosen() -> Iterator[Finding]:
    """Interfaces that variables choose."""
    try:
        network.check_interfaces()
    except ValueError as error:
        yield problem("GLOO_SOCKET_IFNAME", str(error), "unset GLOO_SOCKET_IFNAME")
    own = [name for _, name in socket.if_nameindex()]
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if wanted and not _nccl_finds(wanted, own):
        yield problem(
            "NCCL_SOCKET_IFNAME",
            f"NCCL_SOCKET_IFNAME={wanted}: this machine has "
            f"{', '.join(own)}, none of which that is",
            "name one of these, or unset it",
        )


def _nccl_finds(wanted: str, own: list[str]) -> bool:
    """Whether NCCL takes any: names are beginnings, `=` wants whole ones, `^` all others."""
    excludes, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    names = [name for name in wanted.lstrip("^=").split(",") if name]
    matched = {
        one
        for one in own
        for name in names
        if (one == name.partition(":")[0] if exact else one.startswith(name.partition(":")[0]))
    }
    return bool(set(own) - matched - {"lo"}) if excludes else bool(matched)


def own_name() -> Iterator[Finding]:
    """What this machine's name leads to: gloo's own choice, and what other machines are told."""
    name = platform.node()
    try:
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        yield warning(
            "host name",
            f"{name!r} leads nowhere: {getattr(error, 'strerror', error)}",
            f"add it to /etc/hosts, or give --host ADDRESS: other machines cannot call {name}",
        )
        return
    found = sorted({str(info[4][0]).partition("%")[0] for info in infos})
    if all(ipaddress.ip_address(address).is_loopback for address in found):
        yield warning(
            "host name",
            f"{name} leads to {', '.join(found)}, which is this machine alone",
            "for several machines give --host ADDRESS, or the address in /etc/hosts",
        )
    else:
        yield ok("host name", f"{name} is {', '.join(found)}")


def ports(port: int = _PORT) -> Iterator[Finding]:
    """Whether a run can listen here.

    Args:
        port: as of `train`.
    """
    try:
        text = _RANGE.read_text().split()
        low, high = int(text[0]), int(text[1])
    except (OSError, ValueError, IndexError):  # another system
        low, high = 32768, 60999
    if high - low < 200:
        yield warning(
            "ports",
            f"{high - low + 1} for connections that go out ({low} to {high})",
            "sysctl net.ipv4.ip_local_port_range='32768 60999', by root",
        )
    try:
        network.listen("0.0.0.0", port).close()
    except ValueError as error:
        yield warning(
            "ports",
            str(error).partition(": ")[2] + f" (port {port}{_user_of(port)})",
            "give --port another one; runs on one machine take a free one by themselves",
        )
    else:
        yield ok("ports", f"{port} is free")


def _user_of(port: int) -> str:
    """Who listens there, as far as this user may know."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f", by {psutil.Process(one.pid).name()}, process {one.pid}"
    except (psutil.Error, OSError):  # other users' are not told to everybody
        pass
    return ""


def way_to(target: str) -> Iterator[Finding]:
    """The way to another machine on which `psyche-fast link` runs: what it carries, and its clock.

    Args:
        target: as of `probe.parse_host`.
    """
    host, port = probe.parse_host(target)
    began = time.monotonic()
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        yield problem(
            "name",
            f"{host}: {getattr(error, 'strerror', error)}",
            "spell it otherwise, add it to /etc/hosts, or give an address",
        )
        return
    seconds = time.monotonic() - began
    addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
    yield ok("name", f"{host} is {', '.join(addresses)}")
    if seconds > 1:
        yield warning("name", f"the name server took {seconds:.1f} s", "give an address instead")
    yield from _route(host)
    refused = reaches(host, port, 5.0)
    if refused is not None:
        yield problem("port", f"{host}:{port}: {refused}", _port_remedy(refused, port))
        return
    try:
        yield from _skew(probe.ask_clock(target))
        link = probe.ask(target)
    except ValueError as error:
        yield problem("link", str(error), f"run psyche-fast link --port {port} there")
        return
    said = f"{link}, one way"
    if min(link.up, link.down) < 1e6:
        yield warning("link", said, "slow: psyche-fast estimate --link says which method fits")
    else:
        yield ok("link", said)


def _skew(seconds: float) -> Iterator[Finding]:
    size = abs(seconds)
    said = f"the other one is {size:.3g} s {'ahead' if seconds > 0 else 'behind'}"
    if size > _MOST_SKEW:
        yield warning(
            "clocks",
            said,
            "timedatectl set-ntp true on both: logs of two machines are read side by side, and "
            "certificates and buckets want the right time",
        )
    else:
        yield ok("clocks", f"{said}, by an answer that took about as long either way")


def _route(host: str) -> Iterator[Finding]:
    name = network.interface(host)
    if name is None:
        yield problem(
            "route",
            f"no way from here to {host}",
            "ip route: add one, or start the VPN that leads there",
        )
        return
    state = psutil.net_if_stats().get(name)
    mtu, speed = (state.mtu, state.speed) if state is not None else (0, 0)
    said = (
        f"by {name}" + (f", {speed} Mbit/s" if speed > 0 else "") + (f", MTU {mtu}" if mtu else "")
    )
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    if any(wanted) and name not in wanted:
        yield warning(
            "route",
            f"{said}, but GLOO_SOCKET_IFNAME={','.join(wanted)}",
            "unset it, unless the other network is the faster one",
        )
    elif name not in ("lo", "lo0") and 0 < mtu < 1280:
        yield warning("route", said, "packets are small: raise the interface's MTU, or the VPN's")
    else:
        yield ok("route", said)


def _port_remedy(refused: str, port: int) -> str:
    if "refused" in refused.lower():
        return (
            "nobody listens there, though the machine is reached: run psyche-fast link "
            f"--port {port} there"
        )
    if "no answer" in refused:
        return (
            f"a firewall swallows it, or the machine is off: allow TCP {port} between the machines"
        )
    return "look at ip route, the VPN and the firewall between"
