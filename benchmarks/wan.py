"""Two hosts on this machine with a slow link between them: network namespaces and a relay.

Linux's `netem` is often not built in, so that packets pass through a process of ours, which holds
each back by a latency and lets them out at a rate. Needs root, iproute2 and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x0001 | 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 9000
_QUEUE_SECONDS = 0.5
"""What a router's queue holds at most; more is dropped, as a link does it."""


@contextmanager
def link(bits_per_second: float, latency: float, *, name: str = "wan") -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, 10.98.7.1 and 10.98.7.2.

    Args:
        bits_per_second: in each direction.
        latency: seconds in each direction, so half a round trip.
        name: what the namespaces' names begin with; links that are up at once have one each.

    Raises:
        subprocess.CalledProcessError: no network namespaces here.
    """
    hosts = tuple(f"{name}{os.getpid()}h{n}" for n in range(2))
    relay = None
    try:
        for host in hosts:
            _ip("netns", "add", host)
        relay = subprocess.Popen(
            [sys.executable, __file__, *hosts, str(bits_per_second), str(latency)],
            stdout=subprocess.PIPE,
        )
        assert relay.stdout is not None
        if relay.stdout.readline() != b"ready\n":
            raise subprocess.CalledProcessError(relay.wait(), "the relay")
        for n, host in enumerate(hosts):
            _ip("-n", host, "addr", "add", f"10.98.7.{n + 1}/24", "dev", "wan0")
            _ip("-n", host, "link", "set", "wan0", "mtu", str(_MTU), "up")
            _ip("-n", host, "link", "set", "lo", "up")
        yield hosts[0], hosts[1]
    finally:
        if relay is not None:
            relay.kill()
            relay.wait()
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _tun(host: str) -> int:
    """Opens the device `wan0` inside a namespace."""
    with open(f"/run/netns/{host}") as space:
        if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wan0", _IFF_TUN_NO_PI))
    return device


def _relay(devices: list[int], bits_per_second: float, latency: float) -> None:
    """Passes packets on between two devices until it is killed."""
    waiting: list[tuple[float, int, int, bytes]] = []
    free = [0.0, 0.0]  # when each direction's link has sent all that it took
    number = 0
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, to, packet = heapq.heappop(waiting)
            # The other end may not be up yet, or full: lost, as on a link.
            with suppress(OSError):
                os.write(devices[to], packet)
        pause = min(max(waiting[0][0] - now, 0.0), 1.0) if waiting else 1.0
        for device in select.select(devices, [], [], pause)[0]:
            side = devices.index(device)
            while True:
                try:
                    packet = os.read(device, _MTU)
                except BlockingIOError:
                    break
                now = time.monotonic()
                begins = max(free[side], now)
                if begins - now > _QUEUE_SECONDS:
                    continue
                free[side] = begins + 8 * len(packet) / bits_per_second
                number += 1
                heapq.heappush(waiting, (free[side] + latency, number, 1 - side, packet))


if __name__ == "__main__":
    first, second, rate, seconds = sys.argv[1:]
    opened = [_tun(first), _tun(second)]
    os.nice(-10)  # a router does not wait for what the hosts compute
    print("ready", flush=True)
    _relay(opened, float(rate), float(seconds))
