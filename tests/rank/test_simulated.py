"""`--simulate`: replicas in turn in one process are, to the bit, as many processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psyche_fast.config import RunConfig
from psyche_fast.links import Link
from psyche_fast.rank.clock import Clock, Transfer
from tests.core.test_resume import parameters, same, states, without_later
from tests.core.test_run import DISTRO, losses, train

METHODS = {
    "sparseloco": (
        "2", "--method", "sparseloco", "--every", "3", "--delay", "1", "--mix", "rebase",
        "--chunk", "16", "--topk", "16",
    ),
    "diloco": ("2", "--method", "diloco", "--every", "2", "--values", "4bit"),
    "dense": ("2", "--method", "dense"),
    "distro": ("2", *DISTRO, "--distro-quantization"),
    "levels": (
        "4", "--levels", "2:dense,2:sparseloco(every=3,k=16,chunk=16,delay=1,mix=rebase)",
    ),
}  # fmt: skip
SHORT = ("--total-steps", "4", "--total-batch", "7", "--checkpoint-every", "2", "--optim-stats")
"""Shares of another size each, and checkpoints in mid-round with a message in flight."""


def known(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of lines does not hang on time or on where ranks are."""
    names = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "bytes_sent",
             "bytes_received", "dense_bytes", "nonfinite_losses", "refused_gradients",
             "optim_stats")  # fmt: skip
    return [{name: line[name] for name in names} for line in metrics]


@pytest.mark.processes
@pytest.mark.parametrize("name", METHODS)
def test_every_bit(name: str, place: Path, tmp_path: Path) -> None:
    count, *method = METHODS[name]
    apart = train(place, tmp_path / "apart", *method, *SHORT, "--replicas", count, ranks=int(count))
    here = train(
        place, tmp_path / "here", *method, *SHORT, "--simulate", count, "--link", "10Mbit,1000s"
    )
    assert known(here) == known(apart)
    assert losses(here)[-1] < losses(here)[0]
    for step in (2, 4):
        assert same(parameters(tmp_path / "here", step), parameters(tmp_path / "apart", step))
        assert same(states(tmp_path / "here", step), states(tmp_path / "apart", step))
    clock = [line["virtual_seconds"] for line in here]
    assert clock == pytest.approx(
        [sum(line["virtual_step_seconds"] for line in here[: n + 1]) for n in range(4)]
    )
    # DisTrO sends the second result while it waits for the first, and so on.
    waits = [line["virtual_wait_seconds"] > 1000 for line in here]
    every = {"sparseloco": 3, "diloco": 2, "dense": 1, "distro": 2, "levels": 3}[name]
    assert waits == [step % every == 0 for step in range(1, 5)]


@pytest.mark.processes
@pytest.mark.parametrize("name", ["distro", "levels"])
def test_resumed_is_as_never_interrupted(name: str, place: Path, tmp_path: Path) -> None:
    count, *method = METHODS[name]
    link = ("--link", "10Mbit,100ms") if name == "levels" else ()
    arguments = (*method, *SHORT, "--simulate", count, *link)
    whole = train(place, tmp_path / "whole", *arguments)
    resumed = without_later(tmp_path / "whole", tmp_path / "resumed", 2)
    again = train(place, resumed, *arguments, "--resume", "auto")
    assert known(again) == known(whole)
    assert same(parameters(resumed, 4), parameters(tmp_path / "whole", 4))
    assert same(states(resumed, 4), states(tmp_path / "whole", 4))
    if link:
        assert again[2]["virtual_seconds"] > whole[1]["virtual_seconds"], "the clock goes on"
    else:
        assert "virtual_seconds" not in again[2]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"simulate": 2, "replicas": 2}, "leave out --replicas"),
        ({"simulate": 2, "data_parallelism": 2}, "leave out --data-parallelism"),
        ({"simulate": 2, "tensor_parallelism": 2}, "leave out --tensor-parallelism"),
        ({"simulate": 2, "elastic": True}, "leave out --elastic"),
        ({"simulate": 2, "local_ranks": 2}, "--local-ranks 2 is more than the run's 1 ranks"),
        ({"simulate": 2, "method": None}, "--simulate 2 needs --distro"),
        ({"simulate": 8, "total_batch": 7}, "--total-batch 7 is less than --simulate 8"),
        ({"simulate": 2, "link": "10Mbit"}, "link '10Mbit': wanted a rate and a latency"),
        ({"simulate": -1}, "--simulate must be at least 0"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RunConfig.of(**{"method": "diloco", "param_dtype": "float32", **values})


def test_a_clock_counts_what_overlap_does_not_hide() -> None:
    link = Link(up=8e6, down=8e6, latency=0.5)
    clock = Clock(link)
    late = Transfer(
        up=1_000_000, down=1_000_000, delay=1, ways=2
    )  # a second on the link, and two ways
    steps = [clock.step(1.5, [late], 0.5) for _ in range(3)]
    # Sent at 1.5 and there at 3.5; wanted at 3.5. Then sent at 3.5, there at 5.5, wanted at 5.5.
    assert [s["virtual_wait_seconds"] for s in steps] == [0.0, 0.0, 0.0]
    assert clock.step(0.5, [], 0.0)["virtual_wait_seconds"] == pytest.approx(1.0)
    assert clock.seconds == pytest.approx(3 * 2.0 + 0.5 + 1.0)
    at_once = Clock(link).step(1.0, [Transfer(0, 2_000_000, delay=0, ways=2)], 0.25)
    assert at_once["virtual_wait_seconds"] == pytest.approx(3.0)
    assert at_once["virtual_step_seconds"] == pytest.approx(4.25)
    # What is sent after another waits for the link, not for the other's way.
    queue = Clock(link).step(0.0, [Transfer(1_000_000, 0, 0, 2), Transfer(1_000_000, 0, 0, 2)], 0.0)
    assert queue["virtual_wait_seconds"] == pytest.approx(3.0)
