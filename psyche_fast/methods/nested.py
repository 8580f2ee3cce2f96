"""The exchanges of a hierarchy between processes: by the first rank of each site, and inside it."""

from __future__ import annotations

from math import prod

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from psyche_fast.methods.exchanges import group_of
from psyche_fast.methods.hierarchy import Hierarchy, Level
from psyche_fast.methods.replica import Faults
from psyche_fast.methods.rounds import Rounds


def rounds_of(hierarchy: Hierarchy, group: dist.ProcessGroup) -> list[Rounds]:
    """A rank's exchanges at each level; a collective of all ranks of the hierarchy.

    What a site sends at a level its first rank does, for it is what all of them would. What comes
    it hands on to the others, over gloo: so it crosses the link between sites once, and the site's
    own network as often as it has further ranks, in a tree.

    Args:
        hierarchy: this rank's part.
        group: the ranks, in the order of their numbers.

    Raises:
        ValueError: as of `Rounds`.
    """
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    rounds: list[Rounds] = []
    for at, count in enumerate(hierarchy.counts):
        size = prod(hierarchy.counts[:at])
        first = rank - rank % size
        site = group_of(ranks[first : first + size], "gloo") if size > 1 else None
        begin = rank - hierarchy.levels[at].replica * size
        peers = ranks[begin : begin + count * size : size]
        others = group_of(peers, dist.get_backend_config(group)) if count > 1 else None
        if site is None:
            rounds.append(Rounds(Level(hierarchy, at), others))
        elif rank == first:
            rounds.append(Rounds(_Leading(hierarchy, at, site), others))
        else:
            rounds.append(_Following(Level(hierarchy, at), others, site))
    return rounds


class _Leading(Level):
    """A level of the first rank of a site, which hands on what it receives."""

    def __init__(self, hierarchy: Hierarchy, at: int, site: dist.ProcessGroup) -> None:
        super().__init__(hierarchy, at)
        self._site = site

    def receive(self, messages: Tensor, leave_out: Faults | None = None) -> Faults:
        assert leave_out is not None
        said = msgspec.json.encode((list(messages.shape), leave_out))
        content = torch.cat(
            [torch.frombuffer(bytearray(said), dtype=torch.uint8), messages.cpu().view(-1)]
        )
        dist.broadcast(torch.tensor([len(said), len(content)]), group=self._site, group_src=0)
        dist.broadcast(content, group=self._site, group_src=0)
        return super().receive(messages, leave_out)


class _Following(Rounds):
    """The exchanges of a level of a rank that is not its site's first: it sends none to others.

    Its groups with its counterparts are there all the same: torch tells groups apart by how many
    each of their ranks has had before.
    """

    def __init__(
        self, level: Level, group: dist.ProcessGroup | None, site: dist.ProcessGroup
    ) -> None:
        super().__init__(level, group)
        self._level, self._site = level, site

    def send(self) -> int:
        """As of `Rounds`: nothing but what the level has to take up."""
        self._level.send()
        return 0

    def receive(self) -> Faults:
        """As of `Rounds`: what the site's first rank has received."""
        refused: Faults = {}
        while self._level.due():
            sizes = torch.empty(2, dtype=torch.int64)
            dist.broadcast(sizes, group=self._site, group_src=0)
            said, whole = sizes.tolist()
            content = torch.empty(whole, dtype=torch.uint8)
            dist.broadcast(content, group=self._site, group_src=0)
            shape, leave_out = msgspec.json.decode(
                content[:said].numpy().tobytes(), type=tuple[list[int], Faults]
            )
            refused |= self._level.receive(content[said:].view(shape), leave_out)
        return refused

    def resume(self) -> None:
        """As of `Rounds`: the site's first rank exchanges again what is in flight."""
        self._compare()
