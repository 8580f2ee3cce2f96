"""Methods by name."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from psyche_fast.methods.method import SGD, AdamW, Method, Muon, Nesterov, field_names

ENTRY_POINTS = "psyche_fast.methods"
"""Packages add a `Method` of theirs by an entry point of this group."""

_DISTRO = Method(delay=1, lookahead=True)
_DEMO = Method(k=32, values="parameter")
_DILOCO = Method(
    every=500, what="pseudo_gradient", transform="none", select="all", values="bf16",
    feedback="none", merge="mean", outer=Nesterov(rate=0.7, momentum=0.9), inner=AdamW(),
)  # fmt: skip

PRESETS = {
    "distro": _DISTRO,
    "demo": _DEMO,
    "demo-v2": replace(_DEMO, decay=0.995, subtract=0.2),
    "sparseloco": Method(
        every=30, what="pseudo_gradient", transform="none", k=64, values="2bit", decay=0.95,
        feedback="sent", outer=SGD(rate=1.0), inner=AdamW(),
    ),
    "diloco": _DILOCO,
    "streaming-diloco": replace(
        _DILOCO, every=30, fragments=3, delay=1, mix=0.5, values="4bit",
        outer=Nesterov(rate=0.4, momentum=0.9),
    ),
    "muloco": replace(
        _DILOCO, every=30, values="4bit", decay=0.9, feedback="sent",
        outer=Nesterov(rate=0.7, momentum=0.6), inner=Muon(momentum=0.9, nesterov=False),
    ),
    "random-k": Method(transform="none", select="random", k=27, outer=SGD(rate=1.0)),
    "dense": Method(
        what="gradient", transform="none", select="all", values="bf16", feedback="none",
        merge="mean", outer=AdamW(),
    ),
}  # fmt: skip
"""Each as its paper has it, or the runs that are known of; docs/methods.md has the sources."""


def known() -> list[str]:
    """Names that `get` takes."""
    return [*PRESETS, *sorted({p.name for p in entry_points(group=ENTRY_POINTS)} - set(PRESETS))]


def get(name: str, /, **overrides: Any) -> Method:
    """The method of a name, with other values for some of its fields.

    Args:
        name: one of `known()`.
        **overrides: fields of `Method`.

    Raises:
        ValueError: no such method, an entry point that is no method, or fields that do not go
            together.
        TypeError: no such field, or of another type.
    """
    method = PRESETS.get(name)
    for point in entry_points(group=ENTRY_POINTS) if method is None else ():
        if point.name == name:
            method = point.load()
            if not isinstance(method, Method):
                raise ValueError(f"method {name!r}: {point.value} is {type(method).__name__}")
    if method is None:
        raise ValueError(f"method: wanted one of {', '.join(known())}; got {name!r}")
    for field in overrides:
        if field not in field_names():
            raise TypeError(
                f"method {name!r} has no field {field!r}; wanted one of {', '.join(field_names())}"
            )
    return replace(method, **overrides)
