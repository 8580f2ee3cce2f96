"""What a replica that joins an elastic run gets from a member, place by place, in raw bytes.

Parameters, masters and buffers, the results that the next step applies, and random numbers. Its
momentum is zero, and of own results it has none. A header says what follows, with a hash of each
tensor's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from psyche_fast.distro.message import hash_bits
from psyche_fast.rank.state import Piece, Reader
from psyche_fast.rank.trainer import Trainer

_TAKEN = (
    *("optimizer/arrived/", "optimizer/under_way", "random/"),
    *("optimizer/exchanges", "optimizer/standing"),
)
"""Of what a rank has beside the parameters, what one that joins takes over."""
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool,
    )
}  # fmt: skip

E = TypeVar("E")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    dtype: str
    shape: list[int]
    hash: int


class Handover:
    """What a rank of a member hands over: tensors, which are not copied, and their hashes."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._header = msgspec.json.encode(
            [
                _Entry(name=n, dtype=str(t.dtype), shape=list(t.shape), hash=int(hash_bits(t)))
                for n, t in tensors.items()
            ]
        )

    @staticmethod
    def of(trainer: Trainer) -> Handover:
        """That of a trainer, after `plain`."""
        pieces = {n: p for n, p in trainer.state().items() if n.startswith(_TAKEN)}
        pieces = {**trainer.parameter_state(), **pieces}
        return Handover({name: piece.tensor.detach() for name, piece in pieces.items()})

    def send(self, broadcast: Callable[[Tensor], E | None]) -> E | None:
        """Gives it away; what went wrong, if anything did."""
        packed = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        went_wrong = broadcast(torch.tensor([len(packed)])) or broadcast(packed)
        for tensor in self._tensors.values():
            if went_wrong is not None:
                return went_wrong
            went_wrong = broadcast(_bytes(tensor.cpu().contiguous()))
        return went_wrong


def take_up(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Makes a rank that has not trained yet what a `Handover` is of.

    Raises:
        ValueError: the state is another model's, or has been damaged.
    """
    reader = _Handed(tensors)
    trainer.load(reader, reader, is_new=True)
    for name, piece in trainer.parameter_state().items():
        if not torch.equal(hash_bits(piece.tensor).cpu(), hash_bits(tensors[name]).cpu()):
            raise ValueError(f"{name} is not what a member has handed over")


def receive(broadcast: Callable[[Tensor], E | None]) -> tuple[dict[str, Tensor], E | None]:
    """Takes what `Handover.send` gives, into host memory, and what went wrong, if anything did.

    Raises:
        ValueError: it has been damaged on the way.
    """
    size = torch.zeros(1, dtype=torch.int64)
    went_wrong = broadcast(size)
    if went_wrong is not None:
        return {}, went_wrong
    packed = torch.empty(int(size), dtype=torch.uint8)
    went_wrong = broadcast(packed)
    if went_wrong is not None:
        return {}, went_wrong
    tensors = {}
    for entry in msgspec.json.decode(packed.numpy().tobytes(), type=list[_Entry]):
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        went_wrong = broadcast(_bytes(tensor))
        if went_wrong is not None:
            return {}, went_wrong
        if int(hash_bits(tensor)) != entry.hash:
            raise ValueError(f"{entry.name} has been damaged between replicas")
        tensors[entry.name] = tensor
    return tensors, None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class _Handed(Reader):
    """What has been handed over, in the form in which checkpoints are read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def read(self, name: str, like: Piece) -> Tensor:
        tensor = self._tensors.get(name)
        wanted = list(like.tensor.shape), like.tensor.dtype
        if tensor is None or (list(tensor.shape), tensor.dtype) != wanted:
            raise ValueError(f"what a member has handed over has no {name} of the form {wanted}")
        return tensor
