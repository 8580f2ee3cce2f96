"""Plots from a run directory: read what was drawn, not only that something was."""

from __future__ import annotations

import logging
import math

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from psyche_fast.metrics import MetricsWriter, plot_run
from psyche_fast.metrics import plots as plots_module


def write_run(folder, steps=12, **changes):
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "loss": 10.0 / step,
                "tokens_per_second": 1000.0 + 100 * (step % 3),
                "bytes_sent": 0 if step == 1 else 1000,
                "dense_bytes": 0 if step == 1 else 320_000,
            }
            record.update(changes)
            writer.write({name: value for name, value in record.items() if value is not ...})


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures as they are saved, by file name."""
    saved = {}
    original = Figure.savefig

    def savefig(self, target, **options):
        saved[target.name] = self
        original(self, target, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_three_plots_of_readable_size_are_drawn(tmp_path):
    write_run(tmp_path)
    drawn = plot_run(tmp_path)
    assert drawn == [
        tmp_path / "plots" / name for name in ("loss.png", "loss_vs_bytes.png", "throughput.png")
    ]
    for path in drawn:
        pixels = image.imread(path)
        assert pixels.shape[:2] == (540, 960)
        assert pixels[..., :3].std() > 0.01  # there is something on it


def test_the_loss_is_drawn_by_step_with_a_gap_where_it_was_not_finite(tmp_path, figures):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step, loss in ((3, 5.0), (4, math.nan), (5, 4.0)):
            writer.write({"step": step, "loss": loss})
    plot_run(tmp_path)
    [axes] = figures["loss.png"].axes
    [line] = axes.lines
    assert list(line.get_xdata()) == [3, 4, 5]
    assert line.get_ydata() == pytest.approx([5.0, math.nan, 4.0], nan_ok=True)
    assert axes.get_xlabel() == "step"
    assert "nats" in axes.get_ylabel()


def test_a_long_run_gets_a_running_mean(tmp_path, figures):
    write_run(tmp_path, steps=150)
    plot_run(tmp_path)
    raw, mean = figures["loss.png"].axes[0].lines
    assert mean.get_label() == "mean of the last 3 steps"
    expected = [10.0, (10.0 + 5.0) / 2, (10.0 + 5.0 + 10 / 3) / 3, (5.0 + 10 / 3 + 2.5) / 3]
    assert list(mean.get_ydata())[:4] == pytest.approx(expected)
    assert list(raw.get_ydata())[:2] == [10.0, 5.0]


def test_bytes_are_cumulative_and_beside_the_dense_exchange_s(tmp_path, figures):
    write_run(tmp_path)
    plot_run(tmp_path)
    [axes] = figures["loss_vs_bytes.png"].axes
    sent, dense = axes.lines
    assert axes.get_xscale() == "log"
    # The first step sent nothing and has no place on a logarithmic axis.
    assert list(sent.get_xdata()) == [1000 * count for count in range(1, 12)]
    assert list(dense.get_xdata()) == [320_000 * count for count in range(1, 12)]
    assert list(sent.get_ydata()) == [10.0 / step for step in range(2, 13)]
    assert sent.get_label() == "sent: 11.0 kB"
    assert dense.get_label() == "whole gradients would have sent: 3.52 MB"
    assert axes.get_title().endswith("320 times fewer")


def test_throughput_starts_at_zero_and_tells_the_median(tmp_path, figures):
    write_run(tmp_path)
    plot_run(tmp_path)
    [axes] = figures["throughput.png"].axes
    assert axes.get_ylim()[0] == 0
    rates, middle = axes.lines
    assert list(rates.get_ydata())[:3] == [1100.0, 1200.0, 1000.0]
    assert list(middle.get_ydata()) == [1100.0, 1100.0]
    assert middle.get_label() == "median 1.10k tokens/s"


@pytest.mark.parametrize(
    ("changes", "missing", "reason"),
    [
        ({"tokens_per_second": ...}, "throughput.png", "no step has a tokens_per_second"),
        ({"bytes_sent": ...}, "loss_vs_bytes.png", "no step has a bytes_sent"),
        ({"dense_bytes": ...}, "loss_vs_bytes.png", "no step has a dense_bytes"),
        ({"bytes_sent": 0}, "loss_vs_bytes.png", "no bytes were sent"),
    ],
)
def test_a_plot_without_its_fields_is_left_out_with_the_reason(
    tmp_path, caplog, changes, missing, reason
):
    write_run(tmp_path, **changes)
    with caplog.at_level(logging.WARNING, logger=plots_module.__name__):
        drawn = {path.name for path in plot_run(tmp_path)}
    assert drawn == {"loss.png", "loss_vs_bytes.png", "throughput.png"} - {missing}
    assert f"{missing} is left out: {reason}" in caplog.text


def test_a_run_without_a_step_draws_nothing(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("")
    with caplog.at_level(logging.WARNING, logger=plots_module.__name__):
        assert plot_run(tmp_path) == []
    assert caplog.text.count("no step has a") == 3
    assert not (tmp_path / "plots").exists()


def test_a_run_without_metrics_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        plot_run(tmp_path)
