"""The script that runs README.md's commands."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "readme_commands.py"


@pytest.fixture(scope="module")
def readme_commands():
    spec = importlib.util.spec_from_file_location("readme_commands", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def readme(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = """# Title

<!-- ci: run -->
```bash
echo one
echo two
```

Python is not ours to run:

```python
print("bash")
```

- in a list

  <!-- ci: skip needs a GPU -->

  ```bash
  train --gpu
    indented
  ```

<!-- ci: run -->
````bash
cat <<'EOF'
```
EOF
````
"""


def test_blocks_are_found_with_their_lines_and_reasons(readme_commands):
    block = readme_commands.Block
    assert readme_commands.parse(GOOD) == [
        block(5, "echo one\necho two\n", None),
        block(20, "train --gpu\n  indented\n", "needs a GPU"),
        block(26, "cat <<'EOF'\n```\nEOF\n", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n```bash\nls\n```\n", "line 2: a bash block needs"),
        ("<!-- ci: run -->\ntext\n```bash\nls\n```\n", "line 1: marker without a bash block"),
        ("<!-- ci: run -->\n```python\n1\n```\n", "line 1: marker without a bash block"),
        ("<!-- ci: run -->\n", "line 1: marker without a bash block"),
        ("<!-- ci: run -->\n<!-- ci: run -->\n```bash\nls\n```\n", "line 1: marker without"),
        ("<!-- ci: skip -->\n```bash\nls\n```\n", "wanted run or skip REASON, got 'skip'"),
        ("<!-- ci: rum -->\n```bash\nls\n```\n", "wanted run or skip REASON, got 'rum'"),
        ("<!-- ci: run now -->\n```bash\nls\n```\n", "wanted run or skip REASON, got 'run now'"),
        ("```console\n$ ls\n```\n", "line 1: call a shell block bash, not console"),
        ("<!-- ci: run -->\n```bash\nls\n", "line 2: this fence is not closed"),
    ],
)
def test_what_could_go_unrun_by_mistake_is_an_error(readme_commands, text, message):
    with pytest.raises(ValueError, match=message):
        readme_commands.parse(text)


def test_one_marker_serves_one_block(readme_commands):
    with pytest.raises(ValueError, match="line 5: a bash block needs"):
        readme_commands.parse("<!-- ci: run -->\n```bash\nls\n```\n```bash\nls\n```\n")


def block(*lines):
    return "<!-- ci: run -->\n```bash\n" + "\n".join(lines) + "\n```\n\n"


def test_blocks_run_in_order_in_one_copy_of_the_repository(readme_commands, tmp_path, capfd):
    text = block("test -f pyproject.toml", "echo kept > left-behind.txt", "mkdir -p a && cd a")
    text += "<!-- ci: skip needs a GPU -->\n```bash\nexit 7\n```\n"
    # Its own bash starts at the top of the copy again, sees the files, and has no input.
    text += block("cat left-behind.txt", "command -v python", 'read -r line || echo "no input"')
    path = readme(tmp_path, text)
    assert readme_commands.main(["--readme", str(path)]) == 0
    printed = capfd.readouterr().out
    assert "\nkept\n" in printed
    assert "no input" in printed
    assert "skipped: needs a GPU" in printed
    if (ROOT / ".venv" / "bin" / "python").exists():
        assert f"{ROOT}/.venv/bin/python\n" in printed
    assert not (ROOT / "left-behind.txt").exists()


def test_a_failing_block_fails_the_run_and_the_others_still_run(readme_commands, tmp_path, capfd):
    text = block("false", "echo not reached") + block("false | true") + block("echo third")
    assert readme_commands.main(["--readme", str(readme(tmp_path, text))]) == 1
    captured = capfd.readouterr()
    assert "\nnot reached\n" not in captured.out
    assert "\nthird\n" in captured.out
    assert "failed blocks: README.md, line 3; README.md, line 9" in captured.err


def test_an_unset_variable_fails_a_block(readme_commands, tmp_path):
    assert readme_commands.main(["--readme", str(readme(tmp_path, block("echo $NO_SUCH")))]) == 1


def test_a_block_that_hangs_is_ended_with_what_it_started(readme_commands, tmp_path):
    pid_file = tmp_path / "pid"
    text = block(f"sleep 60 & echo $! > {pid_file}", "wait")
    start = time.monotonic()
    arguments = ["--readme", str(readme(tmp_path, text)), "--timeout", "1"]
    assert readme_commands.main(arguments) == 1
    assert time.monotonic() - start < 20
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_listing_runs_nothing(readme_commands, tmp_path, capsys):
    marker = tmp_path / "ran"
    text = block(f"touch {marker}") + "<!-- ci: skip slow -->\n```bash\nmake bench\n```\n"
    assert readme_commands.main(["--list", "--readme", str(readme(tmp_path, text))]) == 0
    assert capsys.readouterr().out == (
        f"README.md, line 3: run\n    touch {marker}\n"
        "README.md, line 8: skip (slow)\n    make bench\n"
    )
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "no bash block to run"),
        ("<!-- ci: skip all -->\n```bash\nls\n```\n", "no bash block to run"),
        ("```bash\nls\n```\n", "line 1: a bash block needs"),
    ],
)
def test_a_readme_that_would_check_nothing_is_an_error(
    readme_commands, tmp_path, capsys, text, message
):
    assert readme_commands.main(["--readme", str(readme(tmp_path, text))]) == 2
    assert message in capsys.readouterr().err


def test_the_project_s_own_readme_is_marked_throughout(readme_commands):
    blocks = readme_commands.parse((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(one.skip_reason is None for one in blocks)
