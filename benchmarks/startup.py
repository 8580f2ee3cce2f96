"""How long a run takes to its first step, and how much of that is our own code.

    python benchmarks/startup.py [--runs 3] [--check]

`train` on the demo's model with two replicas, from the start of the process to the end of rank 0's
first step; and `psyche-fast --help`. Seconds of the clock mean little on a machine with other work,
so seconds of the processor are told beside them: rank 0's, of which libraries' imports are taken
out (what is left is our own code, with what it calls), and its sidecar's. `--check` holds those of
the processor to limits: on two free cores both ranks import at the same time, so that the longer of
the two is what is waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOTAL, OWN, HELP = 8.0, 1.5, 0.3
"""Limits, seconds of a processor."""
STEPS = 2


class Imports:
    """Takes apart this process's time: modules of libraries, and all else.

    A finder before all others, which only wraps what they find.
    """

    def __init__(self, seen: Callable[[str, Any], None]) -> None:
        self._seen = seen
        self._in_libraries, self.libraries = False, 0.0
        self._since = time.process_time()

    @contextmanager
    def _of(self, name: str) -> Iterator[None]:
        before = self._in_libraries
        self._switch(name.partition(".")[0] != "psyche_fast")
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, to_libraries: bool) -> None:
        now = time.process_time()
        if self._in_libraries:
            self.libraries += now - self._since
        self._in_libraries, self._since = to_libraries, now

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """What another finder finds, with its execution timed."""
        with self._of(name):
            for finder in sys.meta_path:
                spec = None if finder is self else finder.find_spec(name, path, target)
                if spec is not None:
                    break
            else:
                return None
        run = getattr(spec.loader, "exec_module", None)
        if run is not None:

            def timed(module: Any) -> None:
                with self._of(name):
                    run(module)
                self._seen(name, module)

            spec.loader.exec_module = timed
        return spec


def child(report: Path, began: float, arguments: list[str]) -> None:
    """`psyche-fast`, which writes where its time went when the first step is done."""

    def seen(name: str, module: Any) -> None:
        if name != "psyche_fast.rank.trainer":
            return
        plain = module.Trainer.optimize

        def optimize(self: Any, step: int) -> Any:
            found = plain(self, step)
            if not report.exists():
                said = {
                    "wall": time.time() - began,
                    "core": time.process_time(),
                    "libraries": imports.libraries,
                    "sidecars": sidecars(),
                }
                report.write_text(json.dumps(said), encoding="utf-8")
            return found

        module.Trainer.optimize = optimize

    imports = Imports(seen)
    sys.meta_path.insert(0, imports)
    sys.argv = ["psyche-fast", *arguments]
    runpy.run_module("psyche_fast", run_name="__main__")


def sidecars() -> list[float]:
    """Seconds of the processor that each sidecar has taken."""
    import psutil

    times = [process.cpu_times() for process in psutil.Process().children()]
    return [one.user + one.system for one in times]


def measure(config: Path, folder: Path) -> dict[str, Any]:
    """One run's figures."""
    report = folder / "startup.json"
    arguments = ["train", "--config", str(config), "--output", str(folder / "run")]
    command = [sys.executable, __file__, "--child", str(report), str(time.time()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(f"the run failed: {done.stderr}")
    said: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return said | {"own": said["core"] - said["libraries"]}


def seconds_of_help() -> float:
    """Seconds of the processor that `--help` takes."""
    before = os.times()
    command = [sys.executable, "-m", "psyche_fast", "--help"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return sum(after[at] - before[at] for at in (2, 3))  # of processes that have ended


def prepare(folder: Path) -> Path:
    """The demo's model and some of its data; the configuration of a run of two steps on them."""
    from psyche_fast.config import RunConfig
    from psyche_fast.core import showcase
    from psyche_fast.data import iter_texts, tokenize_files, train_tokenizer

    files = showcase.standard_library()[::25]
    tokenizer = train_tokenizer(iter_texts(files, errors="skip"), showcase.VOCABULARY)
    tokenize_files(files, tokenizer, folder / "data", errors="skip")
    showcase.make_model(folder / "model", tokenizer)
    run = RunConfig.of(
        model=str(folder / "model"), data_path=str(folder / "data"), total_steps=STEPS,
        sequence_length=showcase.SEQUENCE_LENGTH, micro_batch=8, total_batch=16, warmup_steps=1,
        distro=True, distro_quantization=True, compression_chunk=16, replicas=2,
        param_dtype="float32", device="cpu",
    )  # fmt: skip
    path = folder / "config.toml"
    path.write_text(run.to_toml(), encoding="utf-8")
    return path


def main() -> None:
    """Measures, prints, and with `--check` fails above the limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="status 1 above the limits")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepare(folder)
        runs = []
        for number in range(options.runs):
            (folder / str(number)).mkdir()
            runs.append(measure(config, folder / str(number)))
    print("seconds to the end of the first step; the least of", len(runs), "runs")
    figures = {
        "by the clock": min(run["wall"] for run in runs),
        "of a processor, rank 0": min(run["core"] for run in runs),
        "of these our own code": min(run["own"] for run in runs),
        "of a processor, rank 1": min(max(run["sidecars"]) for run in runs),
        "--help, of a processor": min(seconds_of_help() for _ in range(2 * options.runs)),
    }
    for name, value in figures.items():
        print(f"{name:<24} {value:6.2f}")
    taken = {
        "all": (min(max(run["core"], *run["sidecars"]) for run in runs), TOTAL),
        "our own code": (figures["of these our own code"], OWN),
        "--help": (figures["--help, of a processor"], HELP),
    }
    slow = [f"{name} {took:.2f} s, {most:g} allowed" for name, (took, most) in taken.items()
            if took > most]  # fmt: skip
    if options.check and slow:
        sys.exit("too slow: " + "; ".join(slow))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    else:
        main()
