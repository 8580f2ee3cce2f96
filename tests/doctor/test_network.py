"""Networks that are set up wrong, each made so; no packet leaves this machine."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

from psyche_fast.doctor import network
from psyche_fast.links import Link
from psyche_fast.start import probe
from psyche_fast.start.network import listen
from tests.doctor.support import worst


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def names_lead_to(monkeypatch, *addresses, error=None):
    def look(*args, **options):
        if error is not None:
            raise error
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in addresses]

    monkeypatch.setattr(network.socket, "getaddrinfo", look)


@pytest.mark.parametrize(
    ("addresses", "status"),
    [(("127.0.1.1",), "warning"), (("::1", "127.0.0.1"), "warning"), (("10.0.0.4",), "ok"),
     (("127.0.1.1", "10.0.0.4"), "ok"), (("2001:db8::4",), "ok")],
)  # fmt: skip
def test_what_the_own_name_leads_to(monkeypatch, addresses, status):
    names_lead_to(monkeypatch, *addresses)
    found = worst(network.own_name())["host name"]
    assert found.status == status
    assert status == "ok" or "--host ADDRESS" in found.remedy


@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")]
)
def test_a_name_that_leads_nowhere(monkeypatch, error):
    names_lead_to(monkeypatch, error=error)
    assert worst(network.own_name())["host name"].status == "warning"


def have_interfaces(monkeypatch, *addresses):
    entries = [SimpleNamespace(address=address) for address in addresses]
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: {"eth0": entries})
    state = SimpleNamespace(isup=True, mtu=1500, speed=1000)
    monkeypatch.setattr(network.psutil, "net_if_stats", lambda: {"eth0": state})


@pytest.mark.parametrize(
    ("addresses", "status", "said"),
    [
        (("10.0.0.4", "fe80::1%eth0", "02:fc:00:00:00:01"), "ok", "eth0 10.0.0.4"),
        (("2001:db8::4", "fe80::1%eth0"), "warning", "IPv6 alone"),
        (("fe80::1%eth0",), "warning", "none but loopback"),
        ((), "warning", "none but loopback"),
    ],
)
def test_interfaces(monkeypatch, addresses, status, said):
    have_interfaces(monkeypatch, *addresses)
    found = worst(network.interfaces())
    assert found["interfaces"].status == status
    assert said in found["interfaces"].text
    assert "loopback" not in found


def test_no_loopback(monkeypatch):
    monkeypatch.setattr(network, "reaches", lambda *_: "Network is unreachable")
    assert worst(network.interfaces())["loopback"].status == "problem"


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", None),
        ("GLOO_SOCKET_IFNAME", "eth99", "problem"),
        ("NCCL_SOCKET_IFNAME", "lo", None),
        ("NCCL_SOCKET_IFNAME", "l", None),  # a beginning suffices
        ("NCCL_SOCKET_IFNAME", "=lo", None),
        ("NCCL_SOCKET_IFNAME", "=l", "problem"),
        ("NCCL_SOCKET_IFNAME", "ib", "problem"),
        ("NCCL_SOCKET_IFNAME", "^docker", None),
        ("NCCL_SOCKET_IFNAME", "^e,lo,w", "problem"),
    ],
)
def test_a_variable_that_names_no_interface(monkeypatch, name, value, status):
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv(name, value)
    found = worst(network.interfaces()).get(name)
    assert (None if found is None else found.status) == status


def test_a_port_that_is_taken_names_who_has_it():
    with listen("0.0.0.0", 0) as here:
        port = here.getsockname()[1]
        found = worst(network.ports(port))["ports"]
        assert (found.status, str(port) in found.text) == ("warning", True)
    assert worst(network.ports(port))["ports"].status == "ok"


def test_few_ports_for_connections(monkeypatch, tmp_path):
    (tmp_path / "range").write_text("40000\t40050\n")
    monkeypatch.setattr(network, "_RANGE", tmp_path / "range")
    assert "51 for connections" in worst(network.ports())["ports"].text


@pytest.fixture
def other(monkeypatch):
    """`psyche-fast link` on this machine, in a thread; its port."""
    monkeypatch.setattr(probe, "TARGET_SECONDS", 0.01)
    monkeypatch.setattr(probe, "MOST_SECONDS", 0.1)
    with listen("127.0.0.1", 0) as here:

        def serve():
            with suppress(OSError):  # its socket is closed when the test ends
                probe.serve(here, lambda line: None)

        threading.Thread(target=serve, daemon=True).start()
        yield here.getsockname()[1]
        here.shutdown(socket.SHUT_RDWR)


def test_the_way_to_a_machine_that_answers(other):
    found = worst(network.way_to(f"127.0.0.1:{other}"))
    assert {one.status for one in found.values()} == {"ok"}
    assert set(found) == {"name", "route", "clocks", "link"}
    assert "by lo" in found["route"].text
    assert "bit" in found["link"].text


def test_nobody_listens_there():
    with listen("127.0.0.1", 0) as here:
        port = here.getsockname()[1]
    found = worst(network.way_to(f"127.0.0.1:{port}"))["port"]
    assert (found.status, f"psyche-fast link --port {port}" in found.remedy) == ("problem", True)


def test_something_else_listens_there(monkeypatch):
    monkeypatch.setattr(probe, "ANSWER_SECONDS", 0.2)
    with listen("127.0.0.1", 0) as here:
        found = worst(network.way_to(f"127.0.0.1:{here.getsockname()[1]}"))["link"]
    assert (found.status, "psyche-fast link" in found.remedy) == ("problem", True)


@pytest.mark.parametrize(("ahead", "status"), [(100.0, "warning"), (-100.0, "warning"), (0, "ok")])
def test_the_other_clock(other, monkeypatch, ahead, status):
    plain = probe._TIME
    later = SimpleNamespace(
        pack=lambda seconds: plain.pack(seconds + ahead), size=plain.size, unpack=plain.unpack
    )
    monkeypatch.setattr(probe, "_TIME", later)
    found = worst(network.way_to(f"127.0.0.1:{other}"))["clocks"]
    assert found.status == status
    assert status == "ok" or ("100 s ahead" if ahead > 0 else "100 s behind") in found.text


def test_a_slow_link(other, monkeypatch):
    monkeypatch.setattr(probe, "ask", lambda target: Link(5e5, 1e8, 0.2))
    found = worst(network.way_to(f"127.0.0.1:{other}"))["link"]
    assert (found.status, "estimate --link" in found.remedy) == ("warning", True)


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [("no answer within 5 s", "firewall"), ("No route to host", "ip route")],
)
def test_a_port_that_does_not_answer(monkeypatch, answer, remedy):
    monkeypatch.setattr(network, "reaches", lambda *_: answer)
    found = worst(network.way_to("127.0.0.1:9"))["port"]
    assert (found.status, remedy in found.remedy) == ("problem", True)


def test_no_name_and_no_way(monkeypatch):
    with monkeypatch.context() as patch:
        names_lead_to(patch, error=socket.gaierror(-2, "Name or service not known"))
        assert [one.status for one in network.way_to("nowhere")] == ["problem"]
    monkeypatch.setattr(network.network, "interface", lambda host: None)
    assert worst(network.way_to("127.0.0.1:9"))["route"].status == "problem"


def test_another_interface_than_the_one_that_leads_there(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert worst(network.way_to("127.0.0.1:9"))["route"].status == "warning"
