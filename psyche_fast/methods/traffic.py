"""What goes up and down a replica's link in a round, counted from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

from psyche_fast.distro.chunks import Layout
from psyche_fast.links import GATHERED_WAYS, OWNED_WAYS
from psyche_fast.methods.message import Format
from psyche_fast.methods.method import Method
from psyche_fast.methods.owners import are_owned, sizes_of


class Traffic(NamedTuple):
    """Bytes over one replica's link, of the replica with the most.

    Attributes:
        up: to other replicas, each copy counted.
        down: from other replicas.
    """

    up: int
    down: int


def ways(method: Method, replicas: int) -> int:
    """How often something goes from one end of a link to the other in a round."""
    return OWNED_WAYS if are_owned(method, replicas) else GATHERED_WAYS


def traffic(method: Method, layout: Layout, replicas: int) -> Traffic:
    """What a round of a fragment costs a replica's link in either direction.

    Of an all-gather every replica passes on as much as comes in (its own message, and round a ring
    all others' but one): `replicas - 1` messages up and as many down. Of results that owners merge
    it is about `2 (replicas - 1) / replicas` messages. What replicas agree on is not counted: 17
    bytes for each replica, to each rank.

    `Rounds.bytes_received` is `down`. `Rounds.bytes_sent` is `up` where owners merge, and one
    message of an all-gather's, whose copies are the collective's.

    Args:
        method: the method.
        layout: how a fragment's parameters are cut (`psyche_fast.methods.chunked.cut`), or a rank's
            shards of them; its tensors may be on the device "meta".
        replicas: how many.

    Raises:
        ValueError: there is no replica.
    """
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, got {replicas}")
    others = replicas - 1
    if not are_owned(method, replicas):
        size = Format(method, layout, ["torch"] * len(layout.plans), 0).size
        return Traffic(others * size, others * size)
    sizes, merged = sizes_of(method, layout, replicas)
    up = (sum(sizes) - own + others * out for own, out in zip(sizes, merged, strict=True))
    down = (others * own + sum(merged) - out for own, out in zip(sizes, merged, strict=True))
    return Traffic(max(up), max(down))
