"""`psyche-fast schedule`: what a run's learning rates and batch sizes will be."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import image

from psyche_fast import cli
from psyche_fast.config import RunConfig

RISING = [
    "--total-steps", "1000", "--learning-rate", "0.1", "--warmup-steps", "7", "--total-batch", "8",
    "--total-batch-start", "2", "--batch-warmup-tokens", "20480", "--sequence-length", "64",
]  # fmt: skip


def table(
    capsys: pytest.CaptureFixture[str], plot: Path, *arguments: str
) -> dict[int, tuple[float, int, int]]:
    cli.main(["schedule", "--plot", str(plot), *arguments])
    out, err = capsys.readouterr()
    assert f"plot     {plot}" in err
    head, *lines = out.splitlines()
    assert head.split() == ["step", "learning_rate", "total_batch", "tokens"]
    rows = [line.split() for line in lines]
    return {int(s): (float(rate), int(batch), int(tokens)) for s, rate, batch, tokens in rows}


def test_every_step_is_what_a_run_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = table(capsys, tmp_path / "s.png", *RISING, "--every", "1")
    config = RunConfig.of(
        total_steps=1000, learning_rate=0.1, warmup_steps=7, total_batch=8, total_batch_start=2,
        batch_warmup_tokens=20480, sequence_length=64,
    )  # fmt: skip
    rates, tokens = config.schedule.learning_rates(), 0
    for step, before, rows in config.batch_sizes.steps(1, 1000):
        assert before * 64 == tokens
        tokens += rows * 64
        assert found.pop(step) == (pytest.approx(rates.get_lr(step), rel=1e-5), rows, tokens)
    assert found == {}


def test_a_few_lines_have_the_steps_where_something_begins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    phases = ["--schedule", "wsd", "--stable-steps", "333", "--cosine-decay-steps", "111",
              "--linear-decay-steps", "222", "--cold-start-warmup-steps", "18"]  # fmt: skip
    found = table(capsys, tmp_path / "s.png", *RISING, *phases)
    assert {1, 7, 19, 340, 451, 673, 1000} <= found.keys()
    assert len(found) < 35
    grown = min(step for step, (_, rows, _) in found.items() if rows == 8)
    # The first with all its rows, which 7.5 are rounded to.
    assert 320 * 5.5 / 6 <= found[grown][2] // 64 - 8 < 320 * 5.5 / 6 + 8
    assert found[340][:2] == (pytest.approx(0.1), 8)
    assert found[673][0] == 0


def test_a_configuration_file_and_flags_over_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text('schedule = "constant"\nlearning_rate = 0.5\n')
    arguments = ["--config", str(tmp_path / "run.toml"), "--total-steps", "3", "--warmup-steps"]
    found = table(capsys, tmp_path / "new" / "s.png", *arguments, "2")
    assert [found[step][0] for step in (1, 2, 3)] == [0.25, 0.5, 0.5]
    assert {rows for _, rows, _ in found.values()} == {256}


def test_the_plot_shows_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table(capsys, tmp_path / "s.png", *RISING)
    pixels = (image.imread(tmp_path / "s.png")[..., :3] * 255).round().astype(int)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (pixels == colour).all(axis=-1).sum() > 300
    with pytest.raises(SystemExit) as status:
        cli.main(["schedule", "--plot", str(tmp_path / "s.xyz")])
    assert status.value.code == 2
    assert "'xyz' is not supported" in capsys.readouterr().err
