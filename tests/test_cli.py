"""The command line: what is wrong is said in one line, before anything is spawned or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from psyche_fast import cli
from psyche_fast.config import FLAGS, RunConfig, read_toml
from tests.tiny import save_llama, save_tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    save_tokens(folder / "data")
    (folder / "empty").mkdir()
    (folder / "long").mkdir()
    np.full(10_000, 200, dtype=np.uint16).tofile(folder / "long" / "tokens.bin")
    (folder / "bad.toml").write_text("total_bach = 3\n")
    (folder / "twice.toml").write_text("total_batch = 3\ntotal-batch = 4\n")
    (folder / "types.toml").write_text('total_batch = "3"\n')
    (folder / "good.toml").write_text("total-batch = 6\nlearning_rate = 0.5\n")
    (folder / "section.toml").write_text("[modle]\nmodel = 'x'\n")
    (folder / "elsewhere.toml").write_text("[model]\ntotal_batch = 3\n")
    (folder / "both.toml").write_text("total_batch = 3\n[run]\ntotal_batch = 3\n")
    for name, size, mode in (("secret", 32, 0o600), ("short", 31, 0o600), ("open", 32, 0o640)):
        (folder / name).write_bytes(b"s" * size + b"\n")
        (folder / name).chmod(mode)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def train(place: Path, *arguments: str) -> list[str]:
    return [
        "train", "--model", str(place / "model"), "--data-path", str(place / "data"),
        "--sequence-length", "32", "--device", "cpu", *arguments,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "{place}/nowhere"], "--model: there is no folder"),
        (["--model", "{place}/empty"], "config.json"),
        (["--data-path", "{place}/nowhere"], "--data-path"),
        (["--data-path", "{place}/empty"], "--data-path"),
        (["--data-path", "{place}/long"], "200"),
        (["--token-size", "3"], "--token-size must be 2 or 4, got 3"),
        (["--token-size", "4"], "--token-size"),
        (["--sequence-length", "30000"], "--sequence-length"),
        (["--attn-implementation", "magic"], "'magic' is not one of 'auto'"),
        (["--attn-implementation", "flash_attention_2"], "flash_attention_2"),
        (["--param-dtype", "float16"], "'float16' is not one of"),
        (["--device", "tpu"], "wanted auto, cpu, cuda, cuda:N or cuda:X,Y, got 'tpu'"),
        pytest.param(["--device", "cuda:0,1"], "no CUDA device", marks=pytest.mark.no_gpu),
        (["--python-arch", "Torchtitan"], "Torchtitan"),
        (["--replicas", "2"], "--replicas 2 needs --distro"),
        (["--replicas", "0"], "--replicas must be at least 1"),
        (["--replicas", "9", "--distro", "--total-batch", "8"], "--total-batch 8 is less than"),
        (["--distro-quantization"], "needs --distro"),
        (["--save-path", "{place}/data"], "is there already"),
        (["--save-path", "."], "are in one another"),
        (["--save-path", "out", "--output", "out"], "are in one another"),
        (["--save-path", "out/final", "--output", "out"], "are in one another"),
        (["--save-path", "a", "--output", "a/b/run"], "are in one another"),
        (["--save-path", "runs"], "are in one another"),
        (["--output", "run-\udcff"], r"b'run-\xff' is not UTF-8: rename the file or folder"),
        (["--master-dtype", "bfloat16", "--param-dtype", "float32"], "--master-dtype bfloat16"),
        (["--loss", "chunked", "--liger"], "--loss chunked with --liger"),
        (["--tracker", "wandb"], "--tracker wandb is not installed"),
        pytest.param(["--liger"], "--liger needs a CUDA device", marks=pytest.mark.no_gpu),
        (["--tensor-parallelism", "3"], "does not divide the model's num_attention_heads, 4"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number, got nan"),
        (["--python-arch", "broken:build"], "'broken:build' cannot be imported"),
        (["--config", "{place}/twice.toml"], "appears twice"),
        (["--local-ranks", "3"], "--local-ranks 3 is more than the run's 1 ranks"),
        (["--start-step", "9", "--total-steps", "8"], "--start-step 9 is after --total-steps 8"),
        (["--beta1", "1.5"], r"--beta1 must be in [0, 1)"),
        (["--micro-batch", "many"], "wanted a whole number or auto, got 'many'"),
        (["--config", "{place}/bad.toml"], "no key 'total_bach'; did you mean 'total_batch'?"),
        (["--config", "{place}/types.toml"], "total_batch: Expected `int`, got `str`"),
        (["--config", "{place}/section.toml"], "no table [modle]; did you mean 'model'?"),
        (["--config", "{place}/elsewhere.toml"], "'total_batch' is in [model], not [run]"),
        (["--config", "{place}/both.toml"], "key 'total_batch' appears twice"),
        (["--seed", "-1"], "--seed must be in [0, 4294967296), got -1"),
        (["--port", "65536"], "--port must be in [0, 65536), got 65536"),
        (["--sequence-length", "1"], "--sequence-length must be at least 2, got 1"),
        (["--offload-delta"], "--offload-delta needs --distro"),
        (["--config", "{place}/nowhere.toml"], "No such file"),
        (["--host", "192.0.2.1", "--secret-file", "{place}/secret"], "cannot listen"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines come in only by a secret"),
        (
            ["--tls-key", "{place}/secret"],
            "--tls-cert is missing: --tls-key, --tls-cert and --tls-ca",
        ),
        (["--secret-file", "{place}/nowhere"], "nowhere: No such file or directory; make one: "),
        (["--secret-file", "{place}/short"], "wanted 32 to 65536 bytes, got 31; make one: "),
        (
            ["--secret-file", "{place}/open"],
            "others than its owner may read or write it (mode 06",
        ),
        (["--secret-file", "{place}"], "wanted a file"),
        (["--no-such-flag"], "No such option"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def build(:")
    monkeypatch.syspath_prepend(tmp_path)
    filled = [a.format(place=place) for a in arguments]
    if "--host" not in filled:
        filled.append("--dry-run")
    status, _, err = run(capsys, *train(place, *filled))
    lines = [line for line in err.splitlines() if "error" in line]
    assert status == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in err


def test_dry_run_prints_the_resolved_configuration(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, out, err = run(
        capsys,
        *train(place, "--config", str(place / "good.toml"), "--learning-rate", "0.25", "--dry-run"),
    )
    assert status == 0, err
    assert "total_batch = 6" in out
    assert "learning_rate = 0.25" in out, "a flag goes over the file"
    assert "624 sequences" in err or "sequences of 32 tokens" in err
    assert list(tmp_path.iterdir()) == []


def test_the_seeds_command_line_is_understood(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train(place, "--total-batch", "2", "--micro-batch", "1", "--python", "--dry-run")
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert "total_batch = 2" in out


def test_defaults_are_those_of_psyches_train_example() -> None:
    config = RunConfig().to_dict()
    expected = {
        "sequence_length": 2048, "token_size": 2, "micro_batch": 8, "total_batch": 256,
        "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8, "learning_rate": 4e-4,
        "warmup_steps": 500, "total_steps": 25000, "max_grad_norm": 1.0, "compression_chunk": 64,
        "compression_topk": 4, "compression_decay": 0.999, "attn_implementation": "auto",
        "start_step": 1, "python_arch": "HfAuto", "device": "auto",
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def test_files_are_flat_or_nested_and_give_back_what_was_written(tmp_path: Path) -> None:
    config = RunConfig.of(
        model="m", distro=True, replicas=2, seed=7, learning_rate=0.25, output="o", beta1=0.5
    )
    nested, flat = tmp_path / "nested.toml", tmp_path / "flat.toml"
    nested.write_text(config.to_toml())
    assert "[model]\nmodel = " in nested.read_text()
    # As runs wrote it before there were tables, in any order.
    lines = [line for line in config.to_toml().splitlines() if line and not line.startswith("[")]
    flat.write_text("\n".join(reversed(lines)))
    written = nested.read_text()  # by a version that had one option more
    nested.write_text(written.replace("[parallelism]\n", "[parallelism]\nmixed_gpus = false\n"))
    assert "mixed_gpus" in nested.read_text()
    for file in (nested, flat):
        assert RunConfig.of(**read_toml(str(file))) == config


def test_every_range_that_is_declared_is_checked_by_the_name_of_its_flag() -> None:
    numbers = {n: f.kind for n, f in FLAGS.items() if f.kind in (int, float)}
    assert len(numbers) > 20
    for name, kind in numbers.items():
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} must be ") as error:
            RunConfig.of(**{"distro": True, name: kind(-1)})
        assert str(error.value).endswith(f"got {kind(-1)}")


def test_help_is_instant() -> None:
    command = [sys.executable, "-m", "psyche_fast", "train", "--help"]
    subprocess.run(command, capture_output=True, check=True)  # bytecode and disk cache
    times = []
    for _ in range(3):
        began = os.times()
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        ended = os.times()  # of the processor: other work on the machine takes the clock's
        times.append(sum(ended[at] - began[at] for at in (2, 3)))
    assert min(times) < 0.5
    assert "--compression-topk" in result.stdout


def test_nothing_heavy_is_imported_for_help() -> None:
    program = (
        "import sys; from psyche_fast import cli\n"
        "of_commands = [[name, '--help'] for name in cli.cli.commands]\n"
        "for words in [['--help'], ['--version'], *of_commands]:\n"
        "    try: cli.main(words)\n"
        "    except SystemExit as end: assert not end.code\n"
        "sys.exit(bool({'torch', 'numpy', 'transformers', 'pyarrow', 'rich'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
    )


def test_output_that_holds_a_run_is_kept(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    status, _, err = run(capsys, *train(place, "--output", str(tmp_path), "--dry-run"))
    assert status == 2
    assert "already holds a run" in err
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_tokenize(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.txt").write_text(f"document {n} " * 50)
    status, out, err = run(
        capsys, "tokenize", str(tmp_path / "in"), "--output", str(tmp_path / "out"),
        "--vocab-size", "300",
    )  # fmt: skip
    assert status == 0, err
    assert out.startswith("3 documents")
    assert (tmp_path / "out" / "tokens-00000.bin").stat().st_size > 0


def test_sidecar_launcher_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(
        capsys, "sidecar", "--main-host", "127.0.0.1", "--world-size", "2", "--start-rank", "1"
    )
    assert status == 2
    assert "no CUDA device here for --backend nccl" in err


def test_sidecar_launcher_refuses_ranks_that_do_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = run(
        capsys, "sidecar", "--main-host", "127.0.0.1", "--world-size", "2", "--start-rank", "1",
        "--num-local-ranks", "2", "--backend", "gloo",
    )  # fmt: skip
    assert status == 2
    assert "ranks 1 .. 2 do not fit --world-size 2" in err


def test_a_config_file_with_a_byte_order_mark(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_bytes("\ufefftotal_batch = 24\n".encode())
    status, out, _ = run(capsys, *train(place, "--config", str(tmp_path / "run.toml"), "--dry-run"))
    assert status == 0
    assert "total_batch = 24" in out


def rates(*arguments: str, steps: tuple[int, ...]) -> list[float]:
    """Learning rates by step of a configuration with these flags."""
    values = {
        a[2:].replace("-", "_"): v for a, v in zip(arguments[::2], arguments[1::2], strict=True)
    }
    kinds = {name: FLAGS[name].kind for name in values}
    typed = {n: kinds[n](v) if kinds[n] in (int, float) else v for n, v in values.items()}
    schedule = RunConfig.of(**typed).schedule.learning_rates()
    return [schedule.get_lr(step) for step in steps]


RISE = ["--learning-rate", "0.1", "--warmup-steps", "10", "--warmup-init-lr", "0.02"]


@pytest.mark.parametrize(
    ("arguments", "steps", "expected"),
    [
        (["--total-steps", "110"], (0, 5, 10, 60, 110), (0.02, 0.06, 0.1, 0.055, 0.01)),
        (["--schedule-steps", "60", "--final-lr", "0"], (35, 60, 99), (0.05, 0, 0)),
        (["--schedule", "linear", "--total-steps", "20", "--final-lr", "0.04"], (15, 20, 21),
         (0.07, 0.04, 0.04)),
        (["--schedule", "constant"], (5, 10, 25000), (0.06, 0.1, 0.1)),
        (["--schedule", "wsd", "--stable-steps", "5", "--cosine-decay-steps", "10",
          "--cosine-decay-final-lr", "0.05", "--linear-decay-steps", "10",
          "--linear-decay-final-lr", "0.01"], (14, 15, 20, 25, 30, 35, 99),
         (0.1, 0.1, 0.075, 0.05, 0.03, 0.01, 0.01)),
        (["--schedule", "wsd", "--total-steps", "40", "--linear-decay-steps", "10"],
         (29, 30, 35, 40), (0.1, 0.1, 0.05, 0.0)),
        (["--schedule", "wsd", "--total-steps", "40", "--cosine-decay-steps", "20"],
         (20, 30, 40, 41), (0.1, 0.055, 0.01, 0.01)),
        (["--schedule", "constant", "--start-step", "11", "--cold-start-warmup-steps", "2"],
         (11, 12, 13), (0.0, 0.05, 0.1)),
    ],
)  # fmt: skip
def test_flags_reach_all_schedules(
    arguments: list[str], steps: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    assert rates(*RISE, *arguments, steps=steps) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schedule", "wsd"], "--schedule wsd needs --cosine-decay-steps"),
        (["--stable-steps", "5"], "--stable-steps needs --schedule wsd, not cosine"),
        (["--schedule", "constant", "--final-lr", "0"], "--final-lr needs --schedule cosine or"),
        (["--schedule", "wsd", "--linear-decay-steps", "1", "--linear-decay-final-lr", "9"],
         "--schedule wsd: linear_decay_final_lr 9 must not be more than"),
        (["--schedule", "wsdd"], "'wsdd' is not one of 'cosine', 'linear', 'constant', 'wsd'"),
        (["--total-batch-start", "4"], "--batch-warmup-tokens need each other"),
        (["--total-batch-start", "400", "--batch-warmup-tokens", "9"], "more than --total-batch"),
        (["--replicas", "3", "--distro", "--total-batch-start", "2", "--batch-warmup-tokens", "9"],
         "--total-batch-start 2 is less than --replicas 3"),
        (["--warmup-init-lr", "-1"], "--warmup-init-lr must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    status, _, err = run(capsys, *train(place, *arguments, "--dry-run"))
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
