"""A run that is disturbed at random, from a seed, and what has to hold when it ends.

By hand, for as long as one likes:

    python -m tests.chaos.soak --minutes 30 --seed 7 --world sharded
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from psyche_fast.core.diff import differences
from tests.groups import Command, end_all, run_command
from tests.processes import is_there, wait_until
from tests.tiny import save_llama, save_tokens

WORLDS = {
    "alone": ["--learning-rate", "1e-3"],
    "sharded": ["--distro", "--replicas", "2", "--data-parallelism", "2", "--compression-chunk",
                "16", "--check-every", "1", "--learning-rate", "1e-3"],
    "elastic": ["--distro", "--replicas", "3", "--elastic", "--compression-chunk", "16",
                "--check-every", "1", "--learning-rate", "1e-3"],
}  # fmt: skip
_COMMON = [
    "--device", "cpu", "--sequence-length", "16", "--micro-batch", "2", "--total-batch", "4",
    "--param-dtype", "float32", "--threads", "1", "--schedule", "constant", "--warmup-steps", "5",
    "--timeout", "6",
]  # fmt: skip
_DISK = 48 << 20
"""Bytes of the disk that is filled."""
_ENDS = {143, 130, 1, 137}
"""Statuses of a supervisor that was stopped, or has given up on what failed twice."""


@dataclass
class Report:
    """What happened.

    Attributes:
        steps: that the run has trained.
        faults: how often each kind was tried.
        lives: of the core.
        seconds: that it took.
    """

    steps: int
    faults: Counter[str]
    lives: int
    seconds: float


@dataclass
class Soak:
    """A run under disturbance.

    Args:
        world: of `WORLDS`.
        folder: takes model, data and run; a file system of its own can be filled.
        seed: of all choices.
        can_fill: whether `folder` is such a file system.
    """

    world: str
    folder: Path
    seed: int
    can_fill: bool
    faults: Counter[str] = field(default_factory=Counter)
    _seen: dict[int, psutil.Process] = field(default_factory=dict)
    _supervisor: Command | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.run = self.folder / "run"

    # the run

    def arguments(self, output: Path, steps: int) -> list[str]:
        """The run's, or an undisturbed one's."""
        return [
            "train", "--model", str(self.folder / "model"), "--data-path",
            str(self.folder / "data"), "--output", str(output), *_COMMON, *WORLDS[self.world],
            "--total-steps", str(steps),
        ]  # fmt: skip

    def start(self) -> None:
        """Starts the run, from its last checkpoint where it has one."""
        self._supervisor = Command(
            *self.arguments(self.run, 1_000_000), "--checkpoint-every", "5", "--keep", "4",
            "--resume", "auto", "--max-restarts", "1000",
        )  # fmt: skip

    def steps(self) -> int:
        """The last step in the metrics."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def lines(self) -> list[dict[str, object]]:
        """The metrics, but for a line that is being written."""
        path = self.run / "metrics.jsonl"
        text = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in text.split(b"\n")[:-1]]

    def core(self) -> psutil.Process | None:
        """Rank 0, where it runs now."""
        assert self._supervisor is not None
        with suppress(psutil.NoSuchProcess, IndexError):
            process = psutil.Process(self._supervisor.pid)
            for child in process.children(recursive=True):
                self._seen[child.pid] = child
            return process.children()[0]
        return None

    def ranks(self) -> list[psutil.Process]:
        """All ranks that run now, the core first."""
        core = self.core()
        if core is None:
            return []
        with suppress(psutil.NoSuchProcess):
            return [core, *core.children()]
        return []

    # faults

    def kill_core(self) -> None:
        """As the kernel's OOM killer does."""
        for rank in self.ranks()[:1]:
            rank.kill()

    def kill_rank(self) -> None:
        """Any of them."""
        if ranks := self.ranks():
            self._random.choice(ranks).kill()

    def stop_rank(self) -> None:
        """For longer than anybody waits."""
        if ranks := self.ranks():
            victim = self._random.choice(ranks)
            victim.suspend()
            time.sleep(9)
            with suppress(psutil.NoSuchProcess):
                victim.resume()

    def pause_rank(self) -> None:
        """For a moment, which is no reason to end."""
        if ranks := self.ranks():
            victim = self._random.choice(ranks)
            victim.suspend()
            time.sleep(self._random.uniform(0.1, 1.5))
            with suppress(psutil.NoSuchProcess):
                victim.resume()

    def terminate(self) -> None:
        """As a cluster does."""
        assert self._supervisor is not None
        self._supervisor.send_signal(signal.SIGTERM)
        self._supervisor.wait(60)

    def interrupt_twice(self) -> None:
        """As somebody does who does not want to wait."""
        assert self._supervisor is not None
        self._supervisor.send_signal(signal.SIGINT)
        time.sleep(self._random.uniform(0, 0.2))
        with suppress(ProcessLookupError):
            self._supervisor.send_signal(signal.SIGINT)
        self._supervisor.wait(60)

    def kill_supervisor(self) -> None:
        """Which takes all along."""
        assert self._supervisor is not None
        self.core()
        os.kill(self._supervisor.pid, signal.SIGKILL)
        self._supervisor.wait(60)

    def flip_a_bit(self) -> None:
        """In a file of a checkpoint, seen when it is read."""
        if files := self._files():
            path = self._random.choice(files)
            with suppress(OSError), path.open("r+b") as file:
                at = self._random.randrange(max(path.stat().st_size, 1))
                file.seek(at)
                byte = file.read(1) or b"\0"
                file.seek(at)
                file.write(bytes([byte[0] ^ 1 << self._random.randrange(8)]))
        self.kill_core()

    def cut_a_file(self) -> None:
        """Of a checkpoint, as a crash of the machine may."""
        if files := self._files():
            path = self._random.choice(files)
            with suppress(OSError):
                os.truncate(path, self._random.randrange(max(path.stat().st_size, 1)))
        self.kill_core()

    def remove_newest(self) -> None:
        """Somebody tidies up."""
        folders = sorted(self.run.glob("checkpoints/step-*"))
        if len(folders) > 1:
            shutil.rmtree(folders[-1], ignore_errors=True)
        self.kill_core()

    def fill_disk(self) -> None:
        """For a while: what is to be saved then is not."""
        if not self.can_fill:
            return
        filler = self.folder / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(self._random.uniform(0.5, 2))
        if self._random.random() < 0.3:
            self.kill_core()
        filler.unlink()

    def _files(self) -> list[Path]:
        """Of the newest checkpoint, where there are others to go on from."""
        folders = sorted(self.run.glob("checkpoints/step-*"))
        newest = folders[-1:] if len(folders) > 1 else []
        return [path for folder in newest for path in folder.rglob("*") if path.is_file()]

    # the soak

    def disturb(self, seconds: float) -> None:
        """Until `seconds` have passed."""
        kinds: dict[Callable[[], None], int] = {
            self.kill_core: 4, self.kill_rank: 20 if self.world == "elastic" else 4,
            self.stop_rank: 1, self.pause_rank: 3,
            self.terminate: 2, self.interrupt_twice: 1, self.kill_supervisor: 2,
            self.flip_a_bit: 3, self.cut_a_file: 2, self.remove_newest: 1,
            self.fill_disk: 2 if self.can_fill else 0,
        }  # fmt: skip
        until = time.monotonic() + seconds
        self.start()
        while time.monotonic() < until:
            self._let_it_train(self._random.choice((0, 3, 8)))
            fault = self._random.choices(list(kinds), list(kinds.values()))[0]
            self.faults[fault.__name__] += 1
            fault()

    def _let_it_train(self, steps: int) -> None:
        """Some steps further than it ever was, with whatever restarts that takes."""
        target = self.steps() + steps
        deadline = time.monotonic() + 120
        while True:
            assert self._supervisor is not None
            status = self._supervisor.poll()
            if status is not None:
                assert abs(status) in _ENDS or status == -9, (status, self._supervisor.stderr())
                self.start()
            if steps == 0 or self.steps() >= target:
                break
            self.core()
            assert time.monotonic() < deadline, self._supervisor.stderr()[-3000:]
            time.sleep(0.05)
        time.sleep(self._random.uniform(0, 0.3))

    def end(self) -> int:
        """Lets the run train on undisturbed, and stops it in order; its last step."""
        self._let_it_train(8)
        if self.world == "elastic":
            try:
                wait_until(lambda: self.lines()[-1]["members"] == 3, 90)
            except AssertionError:
                assert self._supervisor is not None
                last = self._supervisor.stderr()[-3000:]
                raise AssertionError(f"a replica has not come back: {last}") from None
        self.terminate()
        assert self._supervisor is not None
        assert self._supervisor.poll() == 143, self._supervisor.stderr()[-3000:]
        return self.steps()


def soak(world: str, seconds: float, seed: int) -> Report:
    """Disturbs a run, and checks it against one that nobody disturbed.

    Raises:
        AssertionError: something was lost, or something was left.
    """
    began = time.monotonic()
    with _disk() as (folder, can_fill):
        save_llama(folder / "model")
        save_tokens(folder / "data")
        shared = set(os.listdir("/dev/shm"))
        chaos = Soak(world, folder, seed, can_fill)
        chaos.disturb(seconds)
        last = chaos.end()
        end_all()

        left = [p for p in chaos._seen.values() if is_there(p)]
        assert left == [], "processes that nobody ended, with their ports and descriptors"
        left_over = set(os.listdir("/dev/shm")) - shared
        mine = [name for name in left_over if any(str(pid) in name for pid in chaos._seen)]
        assert mine == [], "shared memory that nobody removed"
        hidden = list(chaos.run.rglob(".*"))
        assert hidden == [], f"parts of saves that were not tidied up: {hidden}"

        lines = chaos.lines()
        assert [line["step"] for line in lines] == list(range(1, last + 1)), "steps lost or twice"
        _compare(chaos, folder / "calm")
        lives = (chaos.run / "logs" / "rank-0.log").read_text().count("training begins")
    return Report(last, chaos.faults, lives, time.monotonic() - began)


def _compare(chaos: Soak, calm: Path) -> None:
    """With what an undisturbed run gives; an elastic one's, until it lost a replica."""
    lines = chaos.lines()
    whole = [n for n, x in enumerate(lines) if (x.get("epoch", 0), x.get("lost_rows", 0)) != (0, 0)]
    logs = [log.read_text() for log in (chaos.run / "logs").glob("rank-*.log")]
    # Saved while a replica was away, and then begun again without its momentum.
    anew = [int(n) for log in logs for n in re.findall(r"step-(\d+), where its replica has", log)]
    same = min([*whole, *anew, len(lines)])
    assert same == len(lines) or chaos.world == "elastic"
    if same:
        (done,) = run_command(*chaos.arguments(calm, same))
        assert done.returncode == 0, done.stderr
        found = differences(chaos.run, calm)
        expected = f"losses of {same} steps, "
        assert found.lines == (), (found.lines, same, chaos.faults, lines[same - 3 : same + 1])
        assert found.compared.startswith(expected), found.compared
    losses = [float(str(line["loss"])) for line in lines]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5]), "it has not learnt"


@contextmanager
def _disk() -> Iterator[tuple[Path, bool]]:
    """A folder, and whether it is a file system of its own, which takes root."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    kept = os.environ.get("PSYCHE_FAST_CHAOS_KEEP")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder, mounted
    finally:
        end_all()
        if kept:
            shutil.copytree(folder, kept, dirs_exist_ok=True)
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=WORLDS, default="sharded")
    args = parser.parse_args()
    report = soak(args.world, 60 * args.minutes, args.seed)
    sys.stdout.write(
        f"{args.world}, seed {args.seed}: {sum(report.faults.values())} faults, {report.lives} "
        f"lives, {report.steps} steps in {report.seconds:.0f} s; nothing lost, nothing left\n"
        f"{dict(report.faults)}\n"
    )


if __name__ == "__main__":
    main()
