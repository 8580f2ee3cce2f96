"""What the sections of the configuration are made of: options with a range and a help text."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, lt=1 << 16)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 32)]
Amount = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]


def describe(text: str) -> Meta:
    """The help of an option, for the annotation of its field."""
    return Meta(description=text)


def written(parse: Callable[[str], Any]) -> Meta:
    """How words for the value of an option are read, for the annotation of its field."""
    return Meta(extra={"parse": parse})


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of one part; each field is the flag of that name (`--total-batch`).

    Raises:
        ValueError: a value outside the range that its field declares, named by its flag.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for name, hint in hints.items():
            fault = _fault(getattr(self, name), hint)
            if fault is not None:
                raise ValueError(f"{flag(name)} must be {fault}, got {getattr(self, name)}")


def without_none(hint: Any) -> Any:
    """The type of a field that may be None too."""
    return get_args(hint)[0] if get_origin(hint) in (Union, types.UnionType) else hint


def _fault(value: Any, hint: Any) -> str | None:
    """What a value should have been, if it is not what its field declares."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    bare = without_none(hint.__origin__)
    if value is None and bare is not hint.__origin__:
        return None
    if get_origin(bare) is Literal:
        return None if value in get_args(bare) else " or ".join(map(str, get_args(bare)))
    for meta in (*hint.__metadata__, *getattr(bare, "__metadata__", ())):
        if meta.ge is None:
            continue
        if value < meta.ge or (meta.lt is not None and value >= meta.lt):
            return f"at least {meta.ge}" if meta.lt is None else f"in [{meta.ge}, {meta.lt})"
    return None


def flag(name: str) -> str:
    """The command line's flag of a field."""
    return "--" + name.replace("_", "-")
