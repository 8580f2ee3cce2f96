"""Connections to other machines, held to what a known link takes.

A sender that does not know its link finds out by having a router's queue run over. What is lost is
sent again a round trip later, and what else goes over the link waits behind the queue: on 10 Mbit/s
with 200 ms there and back a message of 1 MB took up to 3.8 s, and never more than 1.2 s where it
was sent at the link's own rate.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import stat
import struct
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from psyche_fast.config import RunConfig
from psyche_fast.links import Link
from psyche_fast.methods.owners import are_owned
from psyche_fast.rank.method import method_of
from psyche_fast.rank.topology import Topology

log = logging.getLogger(__name__)

_SHARE = 0.95
"""Of a link's rate: headers, and what else is said over it, want the rest."""
_MAX_PACING_RATE = 47
"""Linux's SO_MAX_PACING_RATE, which `socket` has no name for."""
_OPEN_FILES = Path("/proc/self/fd")


def pace(link: Link, run: RunConfig, topology: Topology) -> int:
    """Hold this process' TCP connections to other machines to a link's rate; a collective.

    Only on Linux, elsewhere nothing is done; nor where a replica is on several machines, whose
    ranks have faster connections to each other.

    Args:
        link: between replicas.
        run: its method says to how many others a rank sends at once.
        topology: this rank's place.

    Returns:
        How many connections there are.
    """
    if sys.platform != "linux" or not _OPEN_FILES.is_dir() or not _is_on_one_machine(topology):
        return 0
    method, replicas = method_of(run), topology.replicas
    # To owners and from them all at once; what all gather goes round in a ring.
    others = replicas - 1 if method is not None and are_owned(method, replicas) else 1
    senders = others * topology.dp * topology.tp
    rate = int(_SHARE * min(link.up, link.down) / 8 / senders)
    count = sum(hold(int(name), rate) for name in os.listdir(_OPEN_FILES))
    if count:
        log.info(
            "%d connections to other machines are held to %.3g Mbit/s each", count, 8e-6 * rate
        )
    return count


def _is_on_one_machine(topology: Topology) -> bool:
    """Whether all ranks of this replica are on this rank's machine."""
    group = topology.host
    if group is None:
        return True
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = socket.gethostname() + (boot.read_text() if boot.exists() else "")
    digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
    own = torch.tensor([int.from_bytes(digest, "little")])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return all(torch.equal(other, own) for other in found)


def hold(file: int, rate: int) -> bool:
    """Hold an open file to bytes per second, where it is a connection to another machine."""
    try:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            return False
        with socket.socket(fileno=os.dup(file)) as connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6):
                return False
            if connection.type != socket.SOCK_STREAM or not _goes_elsewhere(connection):
                return False
            connection.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, struct.pack("L", rate))
    except OSError:  # closed meanwhile, or not connected
        return False
    return True


def _goes_elsewhere(connection: socket.socket) -> bool:
    own, other = connection.getsockname()[0], connection.getpeername()[0]
    return bool(own != other)  # as a machine's connections to itself have them
