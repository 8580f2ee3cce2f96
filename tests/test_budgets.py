"""How long a run goes on, as people write it; presets; and the configuration that `init` writes."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from psyche_fast.budgets import parse_count, parse_duration, parse_micro_batch
from psyche_fast.config import FLAGS, RunConfig, read_toml
from psyche_fast.core import fitting
from psyche_fast.core.estimate import estimate
from psyche_fast.core.plan import make_plan
from psyche_fast.core.scaffold import init
from psyche_fast.data import tokenize_files, train_tokenizer
from psyche_fast.models.source import check_model, resolve_model
from psyche_fast.presets import PRESETS, values_of
from tests.processes import command
from tests.test_cli import place as place
from tests.test_cli import run, train


@pytest.mark.parametrize(
    ("text", "count"),
    [("300000000", 300_000_000), ("300M", 300_000_000), ("1.5B", 1_500_000_000), ("2t", 2 * 10**12),
     ("3e9", 3 * 10**9), ("2_000", 2000), (" 20 k ", 20_000)],
)  # fmt: skip
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "1.5", "-3", "3X", "1e400", "nan", "0.0001k"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match=r"wanted a (whole )?number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90m", 5400), ("8h", 28800), ("1d12h", 129600), ("1.5h", 5400), ("1h30m", 5400),
     ("1:30:00", 5400), ("90:00", 5400), ("2-00:00:00", 172800), ("1-12:30", 131400), ("0", 0)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "soon", "8 h 3", "inf", "nan", "1:2:3:4", "1h30"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="wanted a time"):
        parse_duration(text)


def test_words_for_the_micro_batch() -> None:
    assert [parse_micro_batch(text) for text in ("auto", "Auto", "12")] == [0, 0, 12]
    with pytest.raises(ValueError, match=r"wanted a whole number or auto, got 'all'"):
        parse_micro_batch("all")


def test_tokens_are_as_many_steps_as_it_takes() -> None:
    plain = {"sequence_length": 10, "total_batch": 4}
    for tokens, steps in ((1, 1), (40, 1), (41, 2), (400, 10), (399, 10), (401, 11)):
        assert RunConfig.of(**plain, total_tokens=tokens).schedule.total_steps == steps
    rising = {**plain, "total_batch_start": 1, "batch_warmup_tokens": 200}
    for tokens in (1, 35, 150, 200, 201, 5000):
        config = RunConfig.of(**rising, total_tokens=tokens)
        sizes, steps = config.batch_sizes, config.schedule.total_steps
        assert sizes.before(steps) * 10 < tokens <= sizes.before(steps + 1) * 10
    config = RunConfig.of(**plain, total_tokens=4000, warmup_fraction=0.25)
    assert (config.schedule.total_steps, config.schedule.warmup_steps) == (100, 25)
    with pytest.raises(ValueError, match="--total-steps 7 and --total-tokens 400, which is 10 st"):
        RunConfig.of(**plain, total_tokens=400, total_steps=7)
    with pytest.raises(ValueError, match=r"--warmup-steps 7 and --warmup-fraction 0.1, which is"):
        RunConfig.of(**plain, warmup_fraction=0.1, warmup_steps=7)


def test_a_budget_goes_over_the_other_one_of_a_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('total-tokens = "1M"\nwarmup-fraction = 0.1\nmax-time = "2h"\n')
    arguments = [*train(place, "--config", str(file), "--dry-run")]
    arguments = [a for a in arguments if not a.startswith("--total-steps")]
    status, out, err = run(capsys, *arguments, "--total-steps", "50", "--total-batch", "8")
    assert status == 0, err
    again = tmp_path / "again.toml"
    again.write_text(out)
    config = RunConfig.of(**read_toml(str(again)))
    assert config.schedule.total_steps == 50
    assert config.schedule.total_tokens is None
    assert (config.schedule.warmup_steps, config.run.max_time) == (5, 7200.0)
    # What follows is not written, so that another batch brings other steps.
    assert "warmup_steps" not in out.replace("cold_start_warmup_steps", "")
    status, _, err = run(capsys, *train(place, "--dry-run"), "--max-time", "soon")
    assert (status, "wanted a time such as 90m" in err) == (2, True)
    file.write_text('total-tokens = "many"\n')
    status, _, err = run(capsys, *train(place, "--config", str(file), "--dry-run"))
    assert status == 2
    assert f"--config {file}: total-tokens: wanted a number such as" in err


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_run_and_says_where_it_is_from(name: str) -> None:
    preset = PRESETS[name]
    assert preset.sources
    assert preset.values.keys() <= FLAGS.keys()
    config = RunConfig.of(**values_of([name], ()))
    if preset.shape is not None:
        assert config.schedule.total_tokens
        assert config.training.micro_batch == 0
        assert config.schedule.warmup_steps == round(0.02 * config.schedule.total_steps)


def test_presets_that_do_not_go_together() -> None:
    assert values_of(["20M", "medium"], ("learning_rate",))["distro"] is True
    with pytest.raises(ValueError, match="--preset 20M and --preset 1B: give one for the model"):
        values_of(["20M", "1B"], ())
    with pytest.raises(ValueError, match="--preset slow and --preset fast: give one for the link"):
        values_of(["slow", "fast"], ())
    with pytest.raises(ValueError, match="--preset slow and --method both say how replicas learn"):
        values_of(["slow"], ("method",))
    with pytest.raises(ValueError, match="--preset 7B: there are 20M, 125M"):
        values_of(["7B"], ())


def test_init_writes_a_run_with_every_key(tmp_path: Path) -> None:
    texts = ["def f(x):\n    return x + 1\n" * 40] * 4
    (tmp_path / "a.txt").write_text(texts[0])
    data = tmp_path / "data"
    tokenize_files([tmp_path / "a.txt"], train_tokenizer(texts, 300), data, progress=False)
    lines = init(tmp_path / "new", ["20M", "medium"], str(data), seed=0)
    file = tmp_path / "new" / "run.toml"
    assert str(file) in lines[-1]
    config = RunConfig.of(**read_toml(str(file)))
    expected = {**values_of(["20M", "medium"], ()), "data_path": str(data)}
    expected["model"] = str(tmp_path / "new" / "model")
    assert config == RunConfig.of(**expected)
    text = file.read_text()
    for name, known in FLAGS.items():
        assert f"\n{name} = " in text or f"\n# {name}" in text, name
        assert known.help.split()[0] in text
    assert "Psyche's consilience-40b run" in text
    summary = check_model(resolve_model(config.model.model))
    assert summary.config["vocab_size"] == 320
    assert summary.config["num_hidden_layers"] == 4
    assert resolve_model(config.model.model).named("tokenizer.json") is not None
    with pytest.raises(ValueError, match="is there already; name a new folder"):
        init(tmp_path / "new", [], None, seed=0)


@pytest.mark.processes
def test_a_run_ends_in_time_with_a_checkpoint_and_goes_on(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = train(place, "--output", str(output), "--total-batch", "2", "--total-steps", "400")
    ended = subprocess.run(
        command(*arguments, "--micro-batch", "auto", "--max-time", "0s"),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"at step 1 of 400 by --max-time; --output {output} --resume auto" in ended.stdout
    assert "micro-batches of 2 sequences: about" in ended.stderr
    assert (output / "checkpoints" / "step-000001" / "state").is_dir()
    again = make_plan(
        RunConfig.of(**read_toml(str(output / "config.toml"))).replace(
            output=str(output), resume="auto", max_time=9.0
        )
    )
    assert again.config.training.micro_batch == 0
    assert again.resolved.training.micro_batch == 2


def test_the_largest_micro_batch_that_fits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.of(sequence_length=32, total_batch=24, param_dtype="float32", loss="plain")
    model = json.loads((place / "model" / "config.json").read_text())
    device = torch.device("cpu")

    def fit(free: int, **changes: int) -> fitting.Fit:
        monkeypatch.setattr(fitting, "free_bytes", lambda device, ranks: free)
        return fitting.largest_micro_batch(config.replace(**changes), model, device, 1)

    all_of_them = fit(10**12)
    assert all_of_them.micro_batch == 24
    assert fit(10**12, replicas=3, distro=True).micro_batch == 8
    assert fit(10**12, data_parallelism=2).micro_batch == 12
    for size in (7, 11, 23):
        config_of = config.replace(micro_batch=size)
        need = estimate(model, config_of, "cpu")
        free = need.memory + need.snapshot + fitting._PROCESS
        found = fit(free)
        forwards = math.ceil(24 / size)
        assert found.micro_batch == math.ceil(24 / forwards) <= size
        assert found.needed <= free
    with pytest.raises(ValueError, match=r"not even one sequence fits: a rank needs 0.. GB by the"):
        fit(1000)
    with pytest.raises(ValueError, match=r"--micro-batch auto: .*; give a number"):
        fitting.largest_micro_batch(config, {**model, "model_type": "nothing"}, device, 1)


def test_memory_that_a_container_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "Path", lambda *parts: tmp_path.joinpath(*parts[1:]))
    assert fitting._of_the_group() == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert fitting._of_the_group() == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert fitting._of_the_group() == [995]
    device = torch.device("cpu")
    assert fitting.free_bytes(device, 1) == int(995 * fitting._SHARE)
    assert fitting.free_bytes(device, 4) == int(995 * fitting._SHARE / 4)
