"""A process ends with another one that is not its parent, by looking for it."""

from __future__ import annotations

import subprocess
import sys
import time

WATCHES = """
import sys, time
from psyche_fast.start.parent import die_with_parent
die_with_parent(int(sys.argv[1]))
print("watches", flush=True)
time.sleep(100)
"""


def test_a_foreign_core_is_looked_for() -> None:
    """One that was killed, too, and that nobody has waited for yet."""
    with subprocess.Popen(["sleep", "100"]) as core:
        command = [sys.executable, "-c", WATCHES, str(core.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "watches\n"
            time.sleep(0.5)
            assert process.poll() is None
            core.kill()
            try:
                assert process.wait(10) == 1
            finally:
                process.kill()
        late = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert (late.returncode, late.stdout) == (1, ""), "it was gone already"
