"""The page about runs: what is in it, of runs in whatever state, and that a browser draws it."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from psyche_fast import cli
from psyche_fast.metrics.live import PageServer
from psyche_fast.metrics.report import page, report, thinned, to_json
from psyche_fast.metrics.runs import read_run, state_of

NOW = 1_800_000_000.0
CHROMIUM = shutil.which("chromium")


def line(step: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "step": step, "time": NOW - 1000 + step, "step_seconds": 1.0, "loss": 5 - step / 100,
        "grad_norm": 1.0, "learning_rate": 1e-3, "num_tokens": 512 * step, "bytes_sent": 1000,
        "dense_bytes": 50_000, "tokens_per_second": 512.0,
        "seconds": {"train": 0.7, "optimize": 0.2}, "memory": {"process": 10**9},
    }  # fmt: skip
    return {**fields, **changes}


def write_run(folder: Path, lines: list[dict[str, Any]], **status: Any) -> Path:
    (folder / "logs").mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.toml").write_text("[schedule]\ntotal_steps = 100\n[run]\noutput = 'x'\n")
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def figures(*folders: Path) -> dict[str, Any]:
    told = report([read_run(folder) for folder in folders], NOW)
    json.loads(to_json(told))
    return {figure["title"]: figure for figure in told["figures"]}


def test_what_a_run_has_is_drawn(tmp_path: Path) -> None:
    lines = [line(n) for n in range(1, 21)]
    lines[4] |= {"refused_results": {"1": 1}, "loss": None}
    lines[9] |= {"eval_loss": 4.5, "eval_bits_per_byte": 2.0}
    drawn = figures(write_run(tmp_path / "run", lines))
    loss = drawn["Loss against bytes sent"]["data"]
    assert loss[0]["x"][:2] == [1000, 2000]
    assert loss[0]["y"][4] is None, "a gap"
    assert (loss[1]["x"], loss[1]["y"]) == ([10_000], [4.5])
    assert drawn["Held-out bits per byte"]["data"][0]["y"] == [2.0]
    assert drawn["Loss against tokens"]["data"][0]["x"][-1] == 512 * 20
    assert drawn["Loss against time"]["data"][0]["x"] == [float(n) for n in range(1, 21)]
    assert drawn["Loss against time"]["layout"]["xaxis"]["title"]["text"] == "seconds"
    phases = drawn["Time of a step by phase"]["data"]
    assert [(p["name"], p["y"][0], p["stackgroup"]) for p in phases] == [
        ("optimize", 0.2, "one"), ("train", 0.7, "one"),
    ]  # fmt: skip
    assert {p["name"] for p in drawn["Exchange of a step"]["data"]} == {
        "run sent", "run dense gradients",
    }  # fmt: skip
    [happened] = drawn["Faults, restarts, refusals"]["data"]
    assert (happened["x"], happened["y"]) == ([5.0], ["refused results"])
    assert happened["text"] == ["step 5: replica 1: 1"]


def test_a_long_run_keeps_its_extremes_and_gaps() -> None:
    steps = [float(n) for n in range(100_000)]
    values: list[float | None] = [n % 7 / 10 for n in range(100_000)]
    values[50_001], values[77_777], values[33_333] = 99.0, -5.0, None
    points = thinned(steps, values)
    assert len(points) < 2000
    assert {(50_001.0, 99.0), (77_777.0, -5.0), (33_333.0, None)} <= set(points)
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (99_999.0, values[-1])
    assert points == sorted(points)
    assert thinned(steps[:50], values[:50]) == list(zip(steps[:50], values[:50], strict=True))


def test_runs_in_whatever_state_can_be_read(tmp_path: Path) -> None:
    torn = write_run(tmp_path / "torn", [line(1), line(2)])
    with (torn / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "loss": 4.\xc3')
    assert [one["step"] for one in read_run(torn).lines] == [1, 2]
    assert read_run(torn).notes == []
    (torn / "metrics.jsonl").write_bytes(
        b'nonsense\n[1]\n{"loss": 1}\n{"step": 4}\n{"step": "5"}\n'
    )
    found = read_run(torn)
    assert [one["step"] for one in found.lines] == [4]
    assert found.notes == ["metrics.jsonl: 2 lines cannot be read and are left out"]
    # Lines of an earlier life that were gone through again, and of a version without the time.
    lives = [line(n, loss=9.0) for n in (1, 2, 3)] + [line(n, time=None) for n in (2, 3, 4)]
    two = read_run(write_run(tmp_path / "two", lives))
    assert [one["step"] for one in two.lines] == [1, 2, 3, 4]
    assert two.lines[1]["loss"] == 5 - 2 / 100
    assert two.times == [1.0, 2.0, 3.0, 4.0]
    odd = [line(1, loss="high", seconds=3, memory=None, grad_norm=[1], refused_results=7)]
    empty = write_run(tmp_path / "empty", [])
    (tmp_path / "only" / "logs").mkdir(parents=True)
    places = [torn, empty, tmp_path / "only", write_run(tmp_path / "odd", odd)]
    told = report([read_run(place) for place in places], NOW)
    assert [card["lines"][0].split(",")[0] for card in told["runs"]] == [
        "step 4 is the last one done", "no step is done yet", "no step is done yet",
        "step 1 is the last one done",
    ]  # fmt: skip
    for nothing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="is no run directory"):
            read_run(nothing)


LOG = """\
2027-01-15 08:00:00,123 rank 0 INFO training begins
2027-01-15 08:00:05+0000 rank 0 WARNING step 3: the gradient is not finite and is refused
where it happened:
  File "x.py", line 1
2027-01-15 08:01:40+0000 rank 0 INFO training begins
"""


def test_restarts_and_faults_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    began = 1_800_000_000.0  # 2027-01-15 08:00
    run = write_run(tmp_path / "run", [line(n, time=began + n) for n in (1, 2)])
    (run / "logs" / "rank-0.log").write_text(LOG)
    (run / "logs" / "stacks-rank-1.txt").write_text("Thread 0x7f:\n  File <b>")
    found = read_run(run)
    assert [(e.time, e.kind) for e in found.events] == [
        (began + 5, "warning"),
        (began + 100, "restart"),
    ]
    assert found.lives == 2
    card = report([found], NOW)["runs"][0]
    assert ["restarts", "1"] in [list(row) for row in card["rows"]]
    assert card["stacks"] == [["stacks-rank-1.txt", "Thread 0x7f:\n  File <b>"]]
    assert card["warnings"][0][1] == "rank 0: step 3: the gradient is not finite and is refused"


BEATS = {
    "1": {"step": 21, "phase": "waiting", "host": "b", "heard": NOW - 1},
    "2": {"step": 20, "phase": "optimize", "host": "c", "heard": NOW - 95},
}


@pytest.mark.parametrize(
    ("status", "name", "said"),
    [
        ({"ended": "finished with step 20"}, "finished", ["finished with step 20"]),
        ({"ended": "stopped by SIGTERM after step 20"}, "finished", ["stopped by SIGTERM"]),
        ({"ended": "failed: rank 2 ended", "time": NOW - 20}, "failed",
         ["failed: rank 2 ended", "rank 2 on c was at step 20: optimize"]),
        ({"time": NOW - 1, "since": NOW - 2}, "running", ["step 20 is the last one done"]),
        ({"time": NOW - 1, "since": NOW - 90}, "stalled",
         ["step 21 has been going on for 90 s (usually 1 s)",
          "silent: rank 2 on c was at step 20: optimize", "heard 94 s before",
          "rank 0 on HERE (process PID) is at step 21: train (computes",
          "rank 1 on b was at step 21: waiting"]),
        ({"time": NOW - 1, "since": NOW - 90, "phase": "checkpoint"}, "running", ["writes a"]),
        ({"time": NOW - 300, "since": NOW - 310}, "gone",
         ["no sign of life, 5 min ago; the process is there, so it is stopped"]),
        ({"time": NOW - 300, "since": NOW - 310, "pid": 2**22 + 5}, "gone", ["it was killed"]),
        ({"time": NOW - 300, "since": NOW - 310, "host": "elsewhere"}, "gone", ["5 min ago"]),
    ],
)  # fmt: skip
def test_a_stalled_run_is_understood(
    tmp_path: Path, status: dict[str, Any], name: str, said: list[str]
) -> None:
    here = {"pid": os.getpid(), "host": platform.node()}
    known = {**here, "step": 21, "phase": "train", "ranks": BEATS, "ended": None, **status}
    run = write_run(tmp_path / "run", [line(n) for n in range(1, 21)], **known)
    state = state_of(read_run(run), NOW)
    assert state.name == name
    text = "\n".join(state.lines).replace(here["host"], "HERE").replace(str(here["pid"]), "PID")
    for part in said:
        assert part in text


def two_runs(folder: Path) -> tuple[Path, Path]:
    runs = [write_run(folder / n, [line(step) for step in range(1, 9)]) for n in ("a<b>", "b")]
    (runs[1] / "config.toml").write_text("[schedule]\ntotal_steps = 100\n[data]\nseed = 3\n")
    evil = {"step": 4, "prompt": "x", "text": "</script><script>document.title = 'taken'</script>"}
    (runs[0] / "samples.jsonl").write_text(json.dumps(evil) + "\n")
    return runs[0], runs[1]


def test_two_runs_on_one_page_that_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = two_runs(tmp_path)
    told = report([read_run(run) for run in runs])
    assert told["differences"] == {"names": ["a<b>", "b"], "rows": [["seed", "\u2014", "3"]]}
    assert [t["name"] for t in told["figures"][0]["data"]] == ["a&lt;b&gt;", "b"]
    cli.main(["report", *map(str, runs), "--output", str(tmp_path / "two.html")])
    assert re.match(r"page {8}.*/two.html \(\d\.\d\d MB\)\n", capsys.readouterr().out)
    text = (tmp_path / "two.html").read_text()
    assert "<script>document.title" not in text
    ours = text[: text.index("<script>")] + text[text.rindex("<script>") :]
    assert "http" not in ours.replace("http-equiv", "")
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path / "none")])
    assert "is no run directory" in capsys.readouterr().err


@contextmanager
def served(*runs: Path) -> Iterator[PageServer]:
    with PageServer(runs, 0, 1.0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_live_page_tells_what_there_is_by_now(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [line(1)])

    def ask(path: str, host: str = "127.0.0.1") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    with served(run) as server:
        assert 'src="plotly.min.js"' in ask("/")[1]
        assert json.loads(ask("/report.json")[1])["runs"][0]["rows"][0] == ["step", "1 of 100"]
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line(2)) + "\n")
        assert json.loads(ask("/report.json?x")[1])["runs"][0]["rows"][0] == ["step", "2 of 100"]
        assert ask("/report.json", "evil.example:80")[0] == 403
        assert ask("/../../etc/passwd")[0] == 404
        shutil.rmtree(run)
        status, text = ask("/report.json")
        assert status == 500
        assert "is no run directory" in text
        with pytest.raises(ValueError, match=r"--port \d+: Address already in use"):
            PageServer([two_runs(tmp_path)[0]], server.server_address[1], 1.0)


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it_without_an_error(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    count = len(report([read_run(run) for run in runs])["figures"])
    (tmp_path / "page.html").write_text(page([read_run(run) for run in runs]))
    result = subprocess.run(
        [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'chromium'}", "--virtual-time-budget=20000",
         "--enable-logging=stderr", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in result.stderr
    assert result.stdout.count('class="main-svg"') >= count
    assert result.stdout.count('class="plot js-plotly-plot"') == count
    assert "<title>a&lt;b&gt;, b</title>" in result.stdout, "nothing of a sample was run"
