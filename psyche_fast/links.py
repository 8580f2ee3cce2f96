"""A network link in numbers: `10Mbit,100ms`, and how long messages take over it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

GATHERED_WAYS, OWNED_WAYS = 4, 8
"""How often something goes from one end to the other in an exchange of messages.

A collective of gloo is a way for a receiver to say that it is ready, and one for what it gets. Of
messages that all gather there are two, the second one to agree on what is refused; of those that
owners merge twice as many.
"""

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_RATE = rf"\s*{_NUMBER}\s*([kMG]?)bit(?:/s)?\s*"
_RATES = re.compile(rf"{_RATE}(?:/{_RATE})?", re.IGNORECASE | re.ASCII)
_LATENCY = re.compile(rf"\s*{_NUMBER}\s*(ms|s)\s*", re.IGNORECASE | re.ASCII)
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_WANTED = "wanted a rate and a latency such as 10Mbit,100ms, or up/down: 10Mbit/100Mbit,100ms"


@dataclass(frozen=True)
class Link:
    """What goes up and what comes down at one end, at the same time.

    Attributes:
        up: bits that can be sent in a second.
        down: bits that can be received in a second.
        latency: seconds from one end to the other.

    Raises:
        ValueError: a rate that is not above zero, or a latency below it; or one of them not finite.
    """

    up: float
    down: float
    latency: float

    def __post_init__(self) -> None:
        for name, rate in (("up", self.up), ("down", self.down)):
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"link: {name} must be above 0 bit/s, got {rate:g}")
        if not (math.isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"link: latency must be at least 0 s, got {self.latency:g}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The link that a text describes, as `str` of a link gives it.

        Args:
            text: `RATE,LATENCY` or `UP/DOWN,LATENCY`: rates in bit, kbit, Mbit or Gbit (per
                second, which `/s` may say), the latency of one way in ms or s.

        Raises:
            ValueError: it is none, or a number is out of range.
        """
        rates, comma, latency = text.partition(",")
        found, time = _RATES.fullmatch(rates), _LATENCY.fullmatch(latency)
        if not comma or found is None or time is None:
            raise ValueError(f"link {text!r}: {_WANTED}")
        up, unit, down, other = found.groups()
        sent = float(up) * _FACTORS[unit.lower()]
        received = sent if down is None else float(down) * _FACTORS[other.lower()]
        seconds = float(time[1]) * (1e-3 if time[2].lower() == "ms" else 1.0)
        try:
            return cls(sent, received, seconds)
        except ValueError as error:
            raise ValueError(f"link {text!r}: {error}") from None

    def seconds(self, sent: float, received: float, ways: int = 1) -> float:
        """From the first byte that is sent until the last one is there.

        Args:
            sent: bytes that go up.
            received: bytes that come down meanwhile.
            ways: how often something has to go from one end to the other.
        """
        return ways * self.latency + max(8 * sent / self.up, 8 * received / self.down)

    def __str__(self) -> str:
        """As `parse` takes it."""
        rates = [_rate(self.up)] if self.up == self.down else [_rate(self.up), _rate(self.down)]
        return f"{'/'.join(rates)},{1e3 * self.latency:.15g}ms"


def _rate(bits: float) -> str:
    unit, factor = next(
        (u, f) for u, f in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)) if bits >= f or f == 1.0
    )
    # As digits alone: `1e+16` is nothing that `parse` knows.
    digits = f"{Decimal(repr(bits / factor)):f}"
    return f"{digits.removesuffix('.0')}{unit}bit"
