"""`--max-restarts`: what is started again, what is not, and that nothing outlives the parent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_fast.config import RunConfig
from psyche_fast.start.supervise import arguments_of
from tests.core.test_run import COMMON, DISTRO
from tests.groups import Command
from tests.processes import free_port, is_there, wait_until
from tests.tiny import save_llama, save_tokens

PARENT = """
import sys
from psyche_fast.start.supervise import supervise
assert "torch" not in sys.modules
steps = iter({steps})
program = {program!r}
sys.exit(supervise(
    lambda life: [sys.executable, "-c", program, str(life)], {restarts}, lambda: next(steps)
))
"""


def parent(program: str, *, restarts: int = 3, steps: str = "range(9)") -> subprocess.Popen[str]:
    text = PARENT.format(program=program, restarts=restarts, steps=steps)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("program", "steps", "restarts", "status", "said"),
    [
        ("import sys; print(sys.argv[1]); sys.exit(sys.argv[1] != '1')", "range(9)", 3, 0,
         "exit status 1 after step 0; start 2 of at most 4"),
        ("import sys; sys.exit(2)", "range(9)", 3, 2, ""),
        ("import os; os.kill(os.getpid(), 9)", "iter([7, 7])", 3, 137,
         "killed by SIGKILL, again after step 7: it would fail a third time"),
        ("import sys; sys.exit(1)", "range(9)", 1, 1, "--max-restarts 1 are used up"),
    ],
)  # fmt: skip
def test_lives(program: str, steps: str, restarts: int, status: int, said: str) -> None:
    out, err = (process := parent(program, restarts=restarts, steps=steps)).communicate(timeout=60)
    assert process.returncode == status
    assert said in err
    if status == 2:
        assert err == ""
    if status == 0:
        assert out == "0\n1\n"


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print(__import__("os").getpid(), flush=True)
time.sleep(60)
"""


def test_a_signal_is_passed_on_and_ends_it() -> None:
    process = parent(WAITS)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3, "the status of what was stopped, and no further life"


def test_nothing_outlives_it() -> None:
    import psutil

    process = parent(WAITS)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not is_there(child), 5)


def test_flags_of_a_configuration_give_it_again() -> None:
    config = RunConfig.of(
        distro=True, replicas=2, learning_rate=1.25e-7, compile=True, seed=3, output="a b",
        save_dtype="float32", attn_implementation="eager", total_batch=4,
    )  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from psyche_fast import cli; import click;"
         "cli.train.callback = lambda **kw: print(cli._resolve(click.get_current_context(),"
         " None, None, {k: v for k, v in kw.items() if k in cli.FLAGS}, says=False).to_toml());"
         "cli.main(sys.argv[1:])", "train", *arguments_of(config)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stdout.strip() == config.to_toml().strip(), result.stderr


def _lives(run: Path) -> int:
    return (run / "logs" / "rank-0.log").read_text().count("training begins")


@pytest.mark.processes
def test_a_run_on_two_machines_comes_back_on_both(tmp_path: Path) -> None:
    """The core is killed, then the other machine's rank: each parent starts its own again."""
    import psutil

    save_llama(tmp_path / "model")
    save_tokens(tmp_path / "data")
    run, port = tmp_path / "run", str(free_port())
    core = Command(
        "train", "--model", str(tmp_path / "model"), "--data-path", str(tmp_path / "data"),
        "--output", str(run), *COMMON, *DISTRO, "--replicas", "2", "--total-steps", "2000",
        "--checkpoint-every", "5", "--keep", "2", "--max-restarts", "4", "--local-ranks", "1",
        "--port", port, "--timeout", "60",
    )  # fmt: skip
    other = Command(
        "sidecar", "--main-host", "127.0.0.1", "--port", port, "--world-size", "2",
        "--start-rank", "1", "--backend", "gloo", "--max-restarts", "9",
    )  # fmt: skip
    metrics = run / "metrics.jsonl"

    def steps() -> list[int]:
        lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines]

    for life, victim in enumerate((core, other), start=1):
        wait_until(lambda: len(steps()) > 12 * life and _lives(run) == life, 120)  # noqa: B023
        (child,) = psutil.Process(victim.pid).children()
        [*child.children(), child][0].kill()  # the core, or the sidecar's rank
    wait_until(lambda: _lives(run) == 3 and steps()[-1] > 50, 120)
    core.send_signal(signal.SIGTERM)
    _, said = core.communicate(60)
    assert core.returncode == 143
    assert "killed by SIGKILL after step" in said
    assert "from step" in said
    assert other.wait(60) == 0
    found = steps()
    assert found == list(range(1, len(found) + 1)), "none lost, none twice"
