"""metrics.jsonl: strict, append-only, and still readable after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from psyche_fast.metrics import MetricsWriter, read_metrics


def write_steps(path, steps, **options):
    with MetricsWriter(path, **options) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 10.0 - step})


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_values_come_back_and_non_finite_numbers_are_null(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(
            {
                "step": 1,
                "loss": math.nan,
                "grad_norm": -math.inf,
                "learning_rate": 4e-4,
                "num_tokens": 2**40,
                "tokens_per_second": 1.5,
                "seconds": {"data": 0.25, "exchange": math.inf},
                "losses": [1.0, math.nan],
                "note": "é",
                "last": False,
                "eval": None,
            }
        )
    assert read_metrics(path) == [
        {
            "step": 1,
            "loss": None,
            "grad_norm": None,
            "learning_rate": 4e-4,
            "num_tokens": 2**40,
            "tokens_per_second": 1.5,
            "seconds": {"data": 0.25, "exchange": None},
            "losses": [1.0, None],
            "note": "é",
            "last": False,
            "eval": None,
        }
    ]
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_lines_are_on_disk_before_the_writer_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys\n"
        "from psyche_fast.metrics.writer import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(1, 4): writer.write({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 2, 9, 20])
def test_a_torn_last_line_is_left_out_and_not_built_upon(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "note": "whole"})
        writer.write({"step": 2, "note": "a tail with an é in it: é"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # A cut of one byte takes only the newline: the object is whole and is kept.
    expected = [1, 2] if cut == 1 else [1]
    assert steps_of(path) == expected
    write_steps(path, [3])
    assert steps_of(path) == [*expected, 3]
    assert path.read_bytes().endswith(b"\n")


def test_a_line_torn_inside_a_character_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + '{"step": 2, "note": "é'.encode()[:-1])
    assert steps_of(path) == [1]


@pytest.mark.parametrize("text", ['{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n[2]\n'])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)


def test_bare_nan_is_not_accepted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')
    with pytest.raises(ValueError, match="line 1: JSON is malformed"):
        read_metrics(path)


def test_a_run_that_starts_again_replaces_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3, 4, 5])
    write_steps(path, [4, 5, 6], drop_from_step=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    write_steps(path, [1], drop_from_step=1)
    assert steps_of(path) == [1]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]  # no temporary file is left


KILLED = """
import os, signal, sys
from psyche_fast.metrics import MetricsWriter
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
MetricsWriter(sys.argv[1], drop_from_step=2)
"""


def test_a_kill_while_lines_are_dropped_leaves_them_and_nothing_for_good(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert steps_of(path) == [1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 2, "killed in the middle of it"
    write_steps(path, [4])
    assert steps_of(path) == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [path]


def test_opening_again_without_dropping_appends_in_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    inode = path.stat().st_ino
    write_steps(path, [3], drop_from_step=3)
    assert steps_of(path) == [1, 2, 3]
    assert path.stat().st_ino == inode


def test_dropping_refuses_a_file_without_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match="record 1 has no whole-number step"):
        MetricsWriter(path, drop_from_step=1)
    assert path.read_text() == '{"epoch": 1}\n'


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer, pytest.raises(TypeError, match="Tensor is unsupported"):
        writer.write({"step": 1, "memory": {"cuda": torch.tensor(1)}})
    assert path.read_text() == ""
    with pytest.raises(ValueError, match="closed"):
        writer.write({"step": 1})


def test_each_line_is_one_json_object(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "note": "two\nlines\u2028here"})
    [line] = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["note"] == "two\nlines\u2028here"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_lines_that_find_no_room_wait_for_it(tmp_path):
    said = []
    with MetricsWriter(tmp_path / "metrics.jsonl", tell=said.append) as writer:
        writer.write({"step": 1})
        real = writer._file

        class Full:  # takes three bytes, then none
            closed, left = False, 3

            def write(self, data):
                if not self.left:
                    raise OSError(28, "No space left on device")
                count, self.left = min(len(data), self.left), 0
                return real.write(data[:count])

        writer._file = Full()
        for step in (2, 3):
            writer.write({"step": step})
        assert said == [f"{tmp_path}/metrics.jsonl: lines have to wait: No space left on device"]
        assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
        writer._file = real
        writer.write({"step": 4})
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(said) == 1
