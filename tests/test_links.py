"""Links as users write them, and the time that bytes take over them."""

from __future__ import annotations

import pytest

from psyche_fast.links import Link


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("10Mbit,100ms", Link(1e7, 1e7, 0.1)),
        ("10Mbit/100Mbit,100ms", Link(1e7, 1e8, 0.1)),
        ("1.5Gbit/s/2.5Gbit/s, 0s", Link(1.5e9, 2.5e9, 0.0)),
        (" 56 kbit , 1.5 s ", Link(5.6e4, 5.6e4, 1.5)),
        ("9600bit/1mbit,.5ms", Link(9600.0, 1e6, 5e-4)),
    ],
)
def test_a_link_is_what_its_text_says(text: str, link: Link) -> None:
    assert Link.parse(text) == link
    assert Link.parse(str(link)) == link


@pytest.mark.parametrize(
    "text",
    ["", "10Mbit", ",100ms", "10,100ms", "10Mbit,100", "10MB,100ms", "10MB/s,1ms", "-1Mbit,1ms",
     "10Mbit,-1ms", "1e3Mbit,1ms", "10Mbit,1ms,2ms", "10Mbit/,1ms", "10Mbit//10Mbit,1ms",
     "1/10Mbit,1ms", "nanMbit,1ms", "10Mbit,infs", "10Mbit;1ms", "٣Mbit,1ms"],
)  # fmt: skip
def test_what_is_none_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="wanted a rate and a latency such as 10Mbit,100ms") as e:
        Link.parse(text)
    assert "\n" not in str(e.value)


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="link '0Mbit,1ms': link: up must be above 0 bit/s, got 0"):
        Link.parse("0Mbit,1ms")
    with pytest.raises(ValueError, match="down must be above 0 bit/s, got nan"):
        Link(1.0, float("nan"), 0.0)
    with pytest.raises(ValueError, match="latency must be at least 0 s, got -1"):
        Link(1.0, 1.0, -1.0)


def test_up_and_down_go_on_at_once() -> None:
    link = Link(1e6, 4e6, 0.25)
    assert link.seconds(125_000, 125_000) == pytest.approx(1.25)
    assert link.seconds(0, 1_000_000) == pytest.approx(2.25)
    assert link.seconds(0, 0) == 0.25
    assert link.seconds(125_000, 0, ways=4) == pytest.approx(2.0)
