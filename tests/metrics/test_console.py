"""What a person sees: plain lines in a file, a live line on a terminal."""

from __future__ import annotations

import io
import logging
import re

import pytest

from psyche_fast.metrics import Console
from psyche_fast.metrics.console import WarnOnce, print_card
from psyche_fast.metrics.formatting import format_bytes, format_count, format_duration


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


LINE = {
    "step": 12,
    "loss": 3.2144,
    "grad_norm": 0.534,
    "learning_rate": 4e-4,
    "tokens_per_second": 12345.6,
    "num_tokens": 4096,
    "seconds": {"data": 0.1},
}


def run(steps, *, stream=None, **options):
    stream = io.StringIO() if stream is None else stream
    clock = Clock()
    with Console(stream=stream, clock=clock, **options) as console:
        for step in steps:
            clock.now += 2.0
            console.step({**LINE, "step": step})
    return stream.getvalue()


def test_a_plain_line_has_the_metrics_and_the_time_left():
    text = run([12], total_steps=100, start_step=12)
    assert text == (
        "step  12/100 | loss 3.214 | grad_norm 0.53 | lr 4.0e-04 | 12.3k tok/s | eta 00:02:56\n"
    )


def test_absent_metrics_are_left_out_and_non_finite_ones_read_nan():
    stream = io.StringIO()
    Console(9, stream=stream, clock=Clock()).step({"step": 1, "loss": None, "grad_norm": 1.0})
    assert stream.getvalue() == "step 1/9 | loss nan | grad_norm 1.00 | eta 00:00:00\n"


def test_a_slow_first_step_is_forgotten_at_the_second():
    stream, clock = io.StringIO(), Clock()
    console = Console(11, stream=stream, clock=clock)
    for seconds, step in ((100.0, 1), (3.0, 2)):
        clock.now += seconds
        console.step({"step": step})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("eta 00:16:40")  # 10 steps of 100 s, which is all it knows
    assert second.endswith("eta 00:00:27")  # 9 steps of 3 s


def test_messages_are_lines_of_their_own_in_plain_output():
    stream = io.StringIO()
    with Console(2, stream=stream, clock=Clock()) as console:
        console.step({"step": 1})
        console.message("checkpoint written")
        console.step({"step": 2})
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == [
        "step 1/2",
        "checkpoint written",
        "step 2/2",
    ]


def test_a_terminal_gets_one_line_that_is_redrawn():
    text = run(range(1, 4), total_steps=40, stream=Terminal())
    last = text.split("\r")[-1]
    assert "step 3/40" in last
    assert "loss 3.214 | 12.3k tok/s | 00:01:14 left" in last
    assert text.count("\n") == 1  # when it is closed


def test_a_resumed_run_starts_its_bar_where_it_is():
    text = run([31], total_steps=40, start_step=31, stream=Terminal())
    assert 0 <= text.find("step 30/40") < text.find("step 31/40")
    assert "step 31/40" in text.split("\r")[-1]


def test_a_message_does_not_break_the_live_line():
    stream = Terminal()
    with Console(10, stream=stream, clock=Clock()) as console:
        console.step({"step": 1, "loss": 2.0})
        console.message("checkpoint written")
    text = stream.getvalue()
    before, after = text.split("checkpoint written\n")
    # The line is blanked before the message and drawn again after it.
    assert before.endswith("\r\x1b[2K")
    assert "step 1/10" in after


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7.4, "7"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (9994, "9.99k"),
        (9996, "10.0k"),
        (12345.6, "12.3k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (2.5e12, "2.50T"),
        (7e15, "7000T"),
        (float("nan"), "nan"),
    ],
)
def test_counts_have_three_digits(value, text):
    assert format_count(value) == text


def test_bytes_are_decimal():
    texts = [format_bytes(value) for value in (0, 999, 1500, 24_700_000)]
    assert texts == ["0 B", "999 B", "1.50 kB", "24.7 MB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00"),
        (59.6, "00:01:00"),
        (3 * 3600 + 25, "03:00:25"),
        (86_400 + 5, "1d 00:00:05"),
        (float("inf"), "--:--:--"),
        (-1, "--:--:--"),
    ],
)
def test_durations_are_clock_times(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_that_is_gone_ends_no_run(terminal):
    class Closing(io.StringIO):
        gone = False

        def isatty(self):
            return terminal

        def write(self, text):
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    stream = Closing()
    console = Console(3, stream=stream)
    console.step({"step": 1, "loss": 2.0})
    stream.gone = True
    for step in (2, 3):
        console.message("hello")
        console.step({"step": step, "loss": 2.0})
    console.close()
    assert "step" in stream.getvalue()
    assert console.stream is not stream


def test_without_a_terminal_there_is_a_line_in_so_many_seconds():
    text = run(range(1, 41), total_steps=40, every=10.0)  # steps of 2 s
    shown = [int(line.split("/")[0].split()[1]) for line in text.splitlines()]
    assert shown == [1, 6, 11, 16, 21, 26, 31, 36, 40]


def test_the_live_line_says_what_the_time_goes_to():
    line = {
        **LINE, "step": 7, "step_seconds": 2.0, "mfu": 0.423,
        "seconds": {"data": 0.2, "train": 1.2, "optimize": 0.3, "counts": 0.2, "send": 0.1},
        "memory": {"process": 2_000_000_000, "cuda_peak_allocated": 31_000_000_000},
    }  # fmt: skip
    stream = Terminal()
    with Console(9, stream=stream, clock=Clock()) as console:
        console.step(line)
        assert console._shares() == ["data 10% device 60% link 30%"]
        said = console._bar.tasks[0].fields["said"]
    assert said == (
        "loss 3.214 | 12.3k tok/s | MFU 42.3% | data 10% device 60% link 30% | 31.0 GB | "
        "00:00:00 left"
    )


def test_a_card_is_a_table_on_a_terminal_and_lines_elsewhere():
    lines = ["model    llama, 36k parameters", "warning  nothing [is] learnt"]
    plain = io.StringIO()
    print_card(lines, plain)
    assert plain.getvalue().splitlines() == lines
    stream = Terminal()
    print_card(lines, stream)
    words = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert [line.split() for line in words.splitlines()] == [line.split() for line in lines]


def test_warnings_of_a_kind_are_told_once():
    told = []
    log = logging.Logger("ours")
    log.addHandler(WarnOnce(told.append, "logs/rank-0.log"))
    for step in (3, 4):
        log.warning("step %d: refused", step)
        log.warning("%s", f"rank {step} died")
        log.warning("the disk is full", extra={"is_told": True})
        log.info("step %d", step)
    assert told == [
        "warning  step 3: refused (more of this kind: logs/rank-0.log)",
        "warning  rank 3 died",
        "warning  rank 4 died",
    ]
