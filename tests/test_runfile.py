"""Psyche's run files: every form of them as our options, what is said of wrong ones, both ways."""

from __future__ import annotations

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from psyche_fast import cli, conversion
from psyche_fast.config import RunConfig
from psyche_fast.runfile import read_run_file
from tests.data.server import serving
from tests.groups import run_command
from tests.tiny import save_llama, save_tokens

# The two that Psyche's documentation begins with, a small run and a large one.
SMALL = """
run_id = "small"
run_state = "WaitingForMembers"
[config]
warmup_time = 30
cooldown_time = 5
epoch_time = 60
max_round_train_time = 30
round_witness_time = 2
min_clients = 2
init_min_clients = 2
global_batch_size_start = 4
global_batch_size_end = 4
global_batch_size_warmup_tokens = 0
verification_percent = 0
witness_nodes = 1
total_steps = 25000
waiting_for_members_extra_time = 3

[model.LLM]
architecture = "HfLlama"
data_type = "Pretraining"
max_seq_len = 512
cold_start_warmup_steps = 0
[model.LLM.data_location]
Server = "127.0.0.1:20001"
[model.LLM.checkpoint.Hub]
repo_id = "emozilla/llama2-20m-init"
[model.LLM.lr_schedule.Cosine]
base_lr = 4.0e-4
warmup_steps = 20
warmup_init_lr = 0.0
total_steps = 2000
final_lr = 4.0e-5
[model.LLM.optimizer.Distro]
compression_decay = 0.999
compression_chunk = 16
compression_topk = 4
quantize_1bit = false
"""
LARGE = """
run_id = "large"
run_state = "WaitingForMembers"

[config]
warmup_time = 3600
cooldown_time = 120
epoch_time = 100000
max_round_train_time = 360
round_witness_time = 5
min_clients = 16
init_min_clients = 16
verification_percent = 0
witness_nodes = 0
global_batch_size_start = 12288
global_batch_size_end = 32768
global_batch_size_warmup_tokens = 549755813888 # 540B tokens
total_steps = 325000
waiting_for_members_extra_time = 10

[model.LLM]
architecture = "HfDeepseek"
data_type = "Pretraining"
max_seq_len = 2048
data_location = { WeightedHttp = "https://storage.googleapis.com/a-bucket/mix.json" }
cold_start_warmup_steps = 100

[model.LLM.checkpoint.Hub]
repo_id = "PsycheFoundation/consilience-v1-40b-init"

[model.LLM.lr_schedule.WarmupStableDecay]
warmup_steps = 2000
warmup_init_lr = 0.0
base_lr = 2.0e-4
stable_steps = 161000
cosine_decay_steps = 150000
cosine_decay_final_lr = 2.0e-5
linear_decay_steps = 12000
linear_decay_final_lr = 2.0e-5 # constant

[model.LLM.optimizer.Distro]
clip_grad_norm = 1.0
compression_decay = 0.995
compression_chunk = 64
compression_topk = 4
quantize_1bit = true
weight_decay = 0.1
"""
TIMES = [
    "warmup_time", "cooldown_time", "epoch_time", "max_round_train_time", "round_witness_time",
    "min_clients", "init_min_clients", "verification_percent", "witness_nodes",
    "waiting_for_members_extra_time",
]  # fmt: skip


def table(**changes: Any) -> dict[str, Any]:
    """A run file's content with other values in `[model.LLM]`."""
    found = tomllib.loads(SMALL)
    found["model"]["LLM"] |= {"data_location": {"Local": "data"}, **changes}
    return found


def write(path: Path, content: dict[str, Any] | str) -> str:
    text = content if isinstance(content, str) else msgspec.toml.encode(content).decode()
    path.write_text(text)
    return str(path)


def options(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return read_run_file(write(tmp_path / "state.toml", table(**changes))).values


def test_a_large_run(tmp_path: Path) -> None:
    file = read_run_file(write(tmp_path / "state.toml", LARGE))
    config = RunConfig.of(**file.under({}))
    rates = config.schedule.learning_rates()
    assert [rates.get_lr(s) for s in (1, 101, 2000, 163_000, 313_000, 325_000)] == pytest.approx(
        [0, 1.01e-5, 2e-4, 2e-4, 2e-5, 2e-5]
    )
    assert rates.get_lr(51) == pytest.approx(2e-4 * 51 / 2000 / 2)  # the cold start's half
    assert next(config.batch_sizes.steps(1, 1)) == (1, 0, 12288)
    half = 549755813888 // 2048 // 2
    assert config.batch_sizes.after(half) == (12288 + 32768) // 2
    assert config.batch_sizes.before(20_000) == pytest.approx(20_000 * 32768, rel=0.25)
    assert config.schedule.total_steps == 325_000
    chosen = config.optimizer
    assert (chosen.distro, chosen.distro_quantization, chosen.compression_decay) == (1, 1, 0.995)
    assert (chosen.max_grad_norm, chosen.weight_decay, chosen.compression_topk) == (1.0, 0.1, 4)
    assert config.data.data_path == "https://storage.googleapis.com/a-bucket/mix.json"
    assert (config.model.python_arch, config.model.sequence_length) == ("HfDeepseek", 2048)
    assert config.run.run_id == "large"


def test_a_name_that_cannot_be_a_folder_is_ignored(tmp_path: Path) -> None:
    content = table()
    content["run_id"] = "not a/name"
    file = read_run_file(write(tmp_path / "state.toml", content))
    assert "run_id" in file.ignored
    assert "run_id" not in file.values


def test_what_has_no_meaning_here_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = table()
    content["progress"] = {"epoch": 0, "step": 7, "epoch_start_data_index": 0}
    path = write(tmp_path / "state.toml", content)
    ignored = ["run_state", "progress", *(f"config.{name}" for name in TIMES)]
    assert set(read_run_file(path).ignored) == {*ignored, "model.LLM.data_type"}
    with pytest.raises(SystemExit):
        cli.main(["train", "--run-file", path, "--model", "/nowhere", "--dry-run"])
    said = capsys.readouterr().err.splitlines()
    assert [all(name in line for name in ignored) for line in said] == [True, False]


RISE = {"base_lr": 0.01, "warmup_init_lr": 0.001, "warmup_steps": 10}
FALL = {**RISE, "final_lr": 0.0, "total_steps": 110}
PHASES = {
    **RISE, "stable_steps": 60, "cosine_decay_steps": 110, "cosine_decay_final_lr": 0.001,
    "linear_decay_steps": 20, "linear_decay_final_lr": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"Constant": RISE}, {5: 0.0055, 10: 0.01, 25000: 0.01}),
        ({"Linear": FALL}, {5: 0.0055, 60: 0.005, 110: 0.0}),
        ({"Cosine": FALL}, {5: 0.0055, 60: 0.005, 110: 0.0}),
        ({"WarmupStableDecay": PHASES}, {5: 0.0055, 69: 0.01, 180: 0.001, 190: 0.0005, 250: 0.0}),
    ],
)
def test_schedules(tmp_path: Path, form: dict[str, Any], expected: dict[int, float]) -> None:
    schedule = RunConfig.of(**options(tmp_path, lr_schedule=form)).schedule
    rates = {step: schedule.learning_rates().get_lr(step) for step in expected}
    assert rates == pytest.approx(expected, abs=1e-15)


ADAMW = {"betas": [0.8, 0.9], "weight_decay": 0.2, "eps": 1e-6}
DISTRO = {
    "compression_decay": 0.9, "compression_topk": 3, "compression_chunk": 32, "quantize_1bit": True,
}  # fmt: skip


def test_optimizers(tmp_path: Path) -> None:
    chosen = RunConfig.of(**options(tmp_path, optimizer={"AdamW": ADAMW})).optimizer
    assert (chosen.distro, chosen.beta1, chosen.beta2, chosen.eps) == (False, 0.8, 0.9, 1e-6)
    assert (chosen.weight_decay, chosen.max_grad_norm) == (0.2, 0.0)
    chosen = RunConfig.of(**options(tmp_path, optimizer={"Distro": DISTRO})).optimizer
    # Left out in Psyche means none, which is not our default.
    assert (chosen.distro, chosen.weight_decay, chosen.max_grad_norm) == (True, 0.0, 0.0)
    assert (chosen.compression_topk, chosen.compression_chunk) == (3, 32)
    clipped = {"AdamW": {**ADAMW, "clip_grad_norm": 2.5}}
    assert options(tmp_path, optimizer=clipped)["max_grad_norm"] == 2.5
    off = {"Distro": {**DISTRO, "clip_grad_norm": -1.0, "weight_decay": 0.3}}
    assert options(tmp_path, optimizer=off)["max_grad_norm"] == 0.0
    assert options(tmp_path, optimizer=off)["weight_decay"] == 0.3


def http(location: dict[str, Any], **changes: Any) -> dict[str, Any]:
    fields = {"location": location, "token_size_in_bytes": "TwoBytes", "shuffle": "DontShuffle"}
    return {"Http": {**fields, **changes}}


NUMBERED = {
    "url_template": "http://h/{}.ds", "start_index": 8, "n_left_pad_zeros": 3, "num_files": 4,
}  # fmt: skip
GCP = {"bucket_name": "b", "filter_directory": "some/folder"}


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("Dummy", {"data_path": "dummy:"}),
        ({"Local": "/some/folder"}, {"data_path": "/some/folder"}),
        ({"Preprocessed": "owner/name"}, {"data_path": "hf://datasets/owner/name"}),
        ({"Preprocessed": "/a/folder"}, {"data_path": "/a/folder"}),
        ({"WeightedHttp": "https://h/mix.json"}, {"data_path": "https://h/mix.json"}),
        ({"WeightedHttp": "https://h/mix?id=3"}, {"data_path": "mixture:https://h/mix?id=3"}),
        (http({"SingleUrl": "https://h/a.ds"}), {"data_path": "https://h/a.ds", "token_size": 2}),
        (http({"NumberedFiles": NUMBERED}),
         {"data_path": "http://h/{008..11}.ds", "token_size": 2}),
        (http({"Gcp": GCP}, token_size_in_bytes="FourBytes"),
         {"data_path": "gs://b/some/folder", "token_size": 4}),
        (http({"SingleUrl": "https://h/a.ds"}, shuffle={"Seeded": [0] * 30 + [1, 2]}),
         {"data_path": "https://h/a.ds", "token_size": 2, "seed": 258}),
        (http({"SingleUrl": "https://h/a.ds"}, shuffle={"Seeded": list(range(32))}),
         {"data_path": "https://h/a.ds", "token_size": 2, "seed_bytes": bytes(range(32)).hex()}),
    ],
)  # fmt: skip
def test_data_locations(tmp_path: Path, location: Any, expected: dict[str, Any]) -> None:
    found = options(tmp_path, data_location=location)
    data = {
        k: v for k, v in found.items() if k in ("data_path", "token_size", "seed", "seed_bytes")
    }
    assert data == expected
    RunConfig.of(**found)
    # And back, to a location of the same meaning.
    back, _ = conversion.write_run_file(RunConfig.of(**found))
    assert options_of(tmp_path, back) == found


def options_of(tmp_path: Path, text: str) -> dict[str, Any]:
    return read_run_file(write(tmp_path / "back.toml", text)).values


@pytest.mark.parametrize(
    ("checkpoint", "model"),
    [
        ({"Hub": {"repo_id": "owner/name"}}, "owner/name"),
        ({"Hub": {"repo_id": "owner/name", "revision": "abc1"}}, "owner/name@abc1"),
        ({"Hub": {"repo_id": "/a/local/folder"}}, "/a/local/folder"),
        ({"Dummy": {"repo_id": ""}}, "dummy:"),
    ],
)
def test_checkpoints(tmp_path: Path, checkpoint: Any, model: str) -> None:
    assert options(tmp_path, checkpoint=checkpoint)["model"] == model


@pytest.mark.parametrize(
    ("changes", "over", "said"),
    [
        ({"checkpoint": "Ephemeral"}, ["--model", "m"], "checkpoint 'Ephemeral' names no model"),
        ({"checkpoint": {"P2P": {"repo_id": "o/n"}}}, ["--model", "m"],
         "checkpoint 'P2P' takes the model from other clients .* began with o/n"),
        ({"checkpoint": {"Gcs": {"bucket": "b"}}}, ["--model", "m"],
         "checkpoint 'Gcs': .* copy gs://b and give --model FOLDER"),
        ({"checkpoint": {"P2PGcs": {"bucket": "b", "prefix": "p"}}}, ["--model", "m"],
         "checkpoint 'P2PGcs': .* copy gs://b/p and give"),
        ({"data_location": {"Server": "127.0.0.1:20001"}}, ["--data-path", "d"],
         "data_location 'Server' 127.0.0.1:20001: .* give --data-path"),
        ({"optimizer": "Dummy"}, ["--no-distro"], "optimizer 'Dummy' trains noth.*'bad optimizer'"),
        ({"architecture": "Torchtitan"}, ["--python-arch", "HfAuto"], "fork of torchtitan"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said_unless_a_flag_is_over_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    over: list[str],
    said: str,
) -> None:
    command = ["train", "--run-file", write(tmp_path / "s.toml", table(**changes)), "--dry-run"]
    with pytest.raises(SystemExit) as status:
        cli.main(command)
    [line] = capsys.readouterr().err.splitlines()
    assert status.value.code == 2
    assert re.search(f"--run-file .*s.toml: model.LLM.{said}|{said}", line)
    with pytest.raises(SystemExit):
        cli.main([*command, *over])  # fails later: there is no such model or data
    assert not re.search(said, capsys.readouterr().err)


def changed(path: str, value: Any) -> dict[str, Any]:
    """A run file with another value, or without the key where it is None."""
    content = table()
    *tables, key = path.split(".")
    at = content
    for name in tables:
        at = at[name]
    if value is None:
        del at[key]
    else:
        at[key] = value
    return content


LLM = "model.LLM"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("run_ids", "x", "there is no key 'run_ids'; did you mean 'run_id'?"),
        ("config", None, "key 'config' is missing"),
        ("config.total_step", 5, "config: there is no key 'total_step'; did you mean 'total_steps"),
        ("config.total_steps", None, "config: key 'total_steps' is missing"),
        ("config.total_steps", "5", r"config: Expected `int`, got `str` - at `\$.total_steps`"),
        ("config.total_steps", 0, r"Expected `int` >= 1 - at `\$.total_steps`"),
        ("config.witness_nodes", -1, r"Expected `int` >= 0 - at `\$.witness_nodes`"),
        ("config.global_batch_size_start", 5, "start 5 is more than global_batch_size_end 4"),
        ("config.global_batch_size_end", 70000, r"<= 65535 - at `\$.global_batch_size_end`"),
        ("model", 3, "model: wanted a table, got 3"),
        (f"{LLM}.lr_schedules", {}, "model.LLM: there is no key 'lr_schedules'; did you mean"),
        (f"{LLM}.max_seq_len", None, "model.LLM: key 'max_seq_len' is missing"),
        (f"{LLM}.max_seq_len", 1, r"model.LLM: Expected `int` >= 2 - at `\$.max_seq_len`"),
        (f"{LLM}.architecture", "HfGpt", r"Invalid enum value 'HfGpt' - at `\$.architecture`"),
        (f"{LLM}.lr_schedule", {"Sine": {}}, "model.LLM.lr_schedule: unknown form 'Sine'"),
        (f"{LLM}.lr_schedule.Cosine.peak", 1, "lr_schedule.Cosine: .* unknown field `peak`"),
        (f"{LLM}.lr_schedule.Cosine.base_lr", -1, "lr_schedule.Cosine: base_lr must not be neg"),
        (f"{LLM}.lr_schedule.Cosine.final_lr", None, "missing required field `final_lr`"),
        (f"{LLM}.optimizer", "Sgd", "model.LLM.optimizer: wanted an object with one of AdamW, Dis"),
        (f"{LLM}.optimizer.Distro.compression_topk", 0, r"Expected `int` >= 1 - at `\$.compressio"),
        (f"{LLM}.optimizer", {"AdamW": {**ADAMW, "betas": [1.0, 0.9]}}, "AdamW: --beta1 must be"),
        (f"{LLM}.data_location", {"Http": {}}, "data_location.Http: .* missing required field"),
        (f"{LLM}.data_location", {"Ftp": "x"}, "model.LLM.data_location: unknown form 'Ftp'"),
        (f"{LLM}.data_location", {"Local": ""}, "data_location.Local must not be empty"),
        (f"{LLM}.data_location", http({"SingleUrl": "a.ds"}), "SingleUrl: wanted a URL, got"),
        (f"{LLM}.data_location", http({"NumberedFiles": {**NUMBERED, "url_template": "http://x"}}),
         r"url_template: wanted one {} for the number"),
        (f"{LLM}.data_location", http({"NumberedFiles": {**NUMBERED, "num_files": 0}}),
         r"NumberedFiles: Expected `int` >= 1 - at `\$.num_files`"),
        (f"{LLM}.data_location", http({"Gcp": {**GCP, "bucket_name": ""}}), "Gcp must not be em"),
        (f"{LLM}.data_location", http({"SingleUrl": "http://x"}, shuffle={"Seeded": [1, 2]}),
         "shuffle.Seeded: wanted 32 numbers from 0 to 255"),
        (f"{LLM}.data_location", http({"SingleUrl": "http://x"}, token_size_in_bytes=2),
         "data_location.Http: .* at `..token_size_in_bytes`"),
        (f"{LLM}.checkpoint", {"Hub": {"repo_id": ""}}, "checkpoint.Hub.repo_id must not be empty"),
        (f"{LLM}.checkpoint", {"Hub": {"repo": "a/b"}}, "checkpoint.Hub: .* unknown field `repo`"),
        (f"{LLM}.checkpoint", "Hub", "LLM.checkpoint: wanted an object with one of Dummy"),
    ],
)  # fmt: skip
def test_one_line_with_the_key(tmp_path: Path, path: str, value: Any, said: str) -> None:
    file = write(tmp_path / "state.toml", changed(path, value))
    with pytest.raises(ValueError, match=said) as error:
        read_run_file(file)
    assert str(error.value).startswith(f"--run-file {file}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run-file .*nowhere.toml: No such file"):
        read_run_file(str(tmp_path / "nowhere.toml"))
    with pytest.raises(ValueError, match="is not TOML"):
        read_run_file(write(tmp_path / "state.toml", "[config"))


def test_what_goes_over_a_file_takes_along_what_belongs_to_it(tmp_path: Path) -> None:
    file = read_run_file(write(tmp_path / "state.toml", LARGE))
    config = RunConfig.of(**file.under({"total_batch": 8, "total_steps": 20}))
    assert [rows for *_, rows in config.batch_sizes.steps(1, 3)] == [8, 8, 8]
    # The schedule's phases are the file's own still.
    assert config.schedule.learning_rates().get_lr(2000) == 2e-4
    cosine = RunConfig.of(**file.under({"schedule": "cosine", "distro": False}))
    assert cosine.schedule.learning_rates().get_lr(325_000) == pytest.approx(2e-5)
    assert not cosine.optimizer.distro


@pytest.mark.parametrize("text", [SMALL, LARGE])
def test_there_and_back(tmp_path: Path, text: str) -> None:
    theirs = write(
        tmp_path / "state.toml", text.replace('Server = "127.0.0.1:20001"', 'Local = "d"')
    )
    ours = tmp_path / "ours.toml"
    cli.main(["convert", theirs, "--output", str(ours)])
    cli.main(["convert", str(ours), "--run-id", "again", "--output", str(tmp_path / "back.toml")])
    back = tomllib.loads((tmp_path / "back.toml").read_text())
    wanted = tomllib.loads(Path(theirs).read_text())
    assert back["run_id"] == "again"
    for content in (back, wanted):
        for name in TIMES:
            assert isinstance(content["config"].pop(name), int)
        content.pop("run_id")
        content["model"]["LLM"]["optimizer"]["Distro"].setdefault("weight_decay", 0.0)
    assert back == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-3, "beta1": 0.5, "eps": 1e-6, "max_grad_norm": 0.0, "model": "o/n@v1"},
        {"distro": True, "replicas": 2, "compression_topk": 7, "distro_quantization": True,
         "schedule": "wsd", "linear_decay_steps": 100, "cold_start_warmup_steps": 40},
        {"schedule": "constant", "total_batch": 64, "total_batch_start": 8,
         "batch_warmup_tokens": 12345, "data_path": "gs://b/f", "token_size": 4, "seed": 9},
    ],
)  # fmt: skip
def test_ours_there_and_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = RunConfig.of(**changes)
    ours = write(tmp_path / "ours.toml", config.to_toml())
    assert conversion.is_run_file(tomllib.loads(SMALL))
    for flat in ({"model": "my/LLM"}, {"schedule": "linear"}, tomllib.loads(config.to_toml())):
        assert not conversion.is_run_file(flat)
    text, notes = conversion.convert(ours, "x")
    assert notes == ()
    assert tomllib.loads(text)["run_id"] == "x"
    again = RunConfig.of(**options_of(tmp_path, text))
    assert again.batch_sizes == config.batch_sizes
    for step in (1, 7, 400, 24_950, 30_000):
        rates = [c.schedule.learning_rates().get_lr(step) for c in (again, config)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    same = dict.fromkeys(changes.keys() - {"replicas", "schedule", "linear_decay_steps"})
    found = again.to_dict()
    assert {name: found[name] for name in same} == {name: changes[name] for name in same}


def test_what_a_run_file_has_no_place_for(tmp_path: Path) -> None:
    config = RunConfig.of(decay="matrices", micro_batch=3, seed=5)
    text, left_out = conversion.write_run_file(config, "x")
    assert left_out == ("seed = 5", "micro_batch = 3", "decay = 'matrices'")
    assert options_of(tmp_path, text)["data_path"] == "data"
    for changes, said in (
        ({"data_path": "s3://b/f"}, "--data-path s3://b/f: Psyche has no location for it"),
        ({"data_path": "my/mix.toml"}, "Psyche has no location for it"),
        (
            {"data_path": 'mixture:{"data":[{"path":"a","weight":2}]}'},
            "--data-path a mixture of a 2: Psyche has no location for it",
        ),
        ({"python_arch": "a.b:c"}, "--python-arch a.b:c: Psyche has no such architecture"),
        ({"total_batch": 1 << 16}, "--total-batch 65536: Psyche's are at most 65535"),
    ):
        with pytest.raises(ValueError, match=said):
            conversion.write_run_file(RunConfig.of(**changes), "x")


@pytest.mark.processes
@pytest.mark.parametrize(("text", "batch"), [(SMALL, None), (LARGE, (2, 5))])
def test_a_run_file_trains(tmp_path: Path, text: str, batch: tuple[int, int] | None) -> None:
    """Data and model are others; the large one's 25 million tokens a step are few here."""
    save_llama(tmp_path / "model")
    save_tokens(tmp_path / "data", 30_000)
    fewer = [] if batch is None else [
        "--total-batch-start", str(batch[0]), "--total-batch", str(batch[1]),
        "--batch-warmup-tokens", str(40 * 2048),
    ]  # fmt: skip
    [result] = run_command(
        "train", "--run-file", write(tmp_path / "state.toml", text), "--model",
        str(tmp_path / "model"), "--data-path", str(tmp_path / "data"), "--total-steps", "20",
        "--param-dtype", "float32", "--device", "cpu", "--threads", "1", "--replicas", "2",
        "--output", str(tmp_path / "run"), *fewer,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("config.witness_nodes") == 1
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = RunConfig.of(**read_run_file(str(tmp_path / "state.toml")).under({"total_steps": 20}))
    assert [m["step"] for m in lines] == list(range(1, 21))
    rates = [config.schedule.learning_rates().get_lr(step) for step in range(1, 21)]
    assert [m["learning_rate"] for m in lines] == pytest.approx(rates)
    length, tokens = config.model.sequence_length, [0, *(m["num_tokens"] for m in lines)]
    rows = [(after - before) // length for before, after in pairwise(tokens)]
    assert rows == sorted(rows)
    assert rows[0] == (2 if batch else 4)
    assert rows[-1] == (5 if batch else 4)
    assert (tmp_path / "run" / "checkpoints" / f"{config.run.run_id}-step20").is_dir()
    assert all(m["loss"] < 6 and m["nonfinite_losses"] == 0 for m in lines)


@pytest.mark.processes
def test_a_run_on_data_of_a_server_that_fails_is_that_on_the_same_data_here(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    tokens = (save_tokens(tmp_path / "data", 4000) / "tokens.bin").read_bytes()
    with serving() as server:
        half = 62 * 64 * 2 // 2 + 4  # 31 sequences of 64 tokens, and two tokens more
        server.files["/8.ds"], server.files["/9.ds"] = (
            tokens[:half],
            tokens[half - 4 : 2 * half - 4],
        )
        server.faults["/9.ds"] = ["fine", "cut", 503]
        place = {
            "NumberedFiles": {
                "url_template": f"{server.url}/{{}}.ds", "start_index": 8, "n_left_pad_zeros": 0,
                "num_files": 2,
            }
        }  # fmt: skip
        shuffled = http(place, shuffle={"Seeded": list(range(32))})
        remote = write(tmp_path / "r.toml", table(data_location=shuffled, max_seq_len=64))
        local = write(tmp_path / "l.toml", table(max_seq_len=64))
        (tmp_path / "data" / "tokens.bin").write_bytes(tokens[: 62 * 64 * 2 + 2])
        here = ["--data-path", str(tmp_path / "data"), "--seed-bytes", bytes(range(32)).hex()]
        losses, said = [], []
        for name, file, arguments in (("r", remote, []), ("l", local, here)):
            [result] = run_command(
                "train", "--run-file", file, "--model", str(tmp_path / "model"), "--total-steps",
                "5", "--param-dtype", "float32", "--device", "cpu", "--threads", "1", "--output",
                str(tmp_path / name), "--data-cache", str(tmp_path / "cache"), *arguments,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
            lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            said.append(result.stderr)
            losses.append([json.loads(line)["loss"] for line in lines])
        assert server.faults["/9.ds"] == []
    assert losses[0] == losses[1]
    assert said[0].count("trying again") == 2
