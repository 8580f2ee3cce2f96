"""What a run's flags come to before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from psyche_fast import compat
from psyche_fast.config import RunConfig
from psyche_fast.core import plan
from psyche_fast.core.resume import Start
from psyche_fast.rank.state import Manifest
from psyche_fast.start.devices import Devices
from tests.tiny import save_llama, save_tokens


@pytest.fixture
def config(tmp_path: Path) -> dict[str, object]:
    save_llama(tmp_path / "model")
    save_tokens(tmp_path / "data")
    return {
        "model": str(tmp_path / "model"), "data_path": str(tmp_path / "data"),
        "sequence_length": 32, "attn_implementation": "sdpa", "distro": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "here", "splits"),
    [
        ({"replicas": 2}, None, False),
        ({"replicas": 2, "local_ranks": 1}, None, True),
        ({"replicas": 2}, 1, True),  # as torchrun starts them
        ({"replicas": 2, "device_backend": "split"}, None, True),
        ({"replicas": 2, "local_ranks": 1, "device_backend": "nccl"}, None, False),
        ({"data_parallelism": 2, "local_ranks": 1}, None, False),  # nothing between replicas
    ],
)
def test_what_goes_between_machines_goes_over_gloo(
    config: dict[str, object],
    flags: dict[str, object],
    here: int | None,
    splits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = Devices((torch.device("cuda", 0), torch.device("cuda", 1)), "nccl")
    monkeypatch.setattr(plan, "choose_devices", lambda spec, ranks: devices)
    made = plan.make_plan(RunConfig.of(**config, **flags), ranks_on_this_machine=here)  # type: ignore[arg-type]
    chosen = made.resolved.parallelism.device_backend
    assert chosen == ("split" if splits else "nccl")
    assert ("gloo between replicas" in "\n".join(made.summary)) == splits


@pytest.mark.parametrize(
    ("chunk", "hidden", "said"),
    [
        (64, 32, ""),
        # Five norms of 128 elements; other sizes are 48 x 128, 64 x 128, 96 x 128 and 128 x 128.
        (
            128,
            128,
            "; plain PyTorch for 21 of 21 tensors, most: chunks are 1 x 128, the kernels take "
            "sides of up to 64",
        ),
    ],
)
def test_the_kernels_of_a_gpu_are_said_at_the_start(
    config: dict[str, object],
    chunk: int,
    hidden: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("PSYCHE_FAST_KERNELS", raising=False)
    model = save_llama(tmp_path / f"model-{hidden}", hidden_size=hidden)
    devices = Devices((torch.device("cuda", 0),), "nccl")
    monkeypatch.setattr(plan, "choose_devices", lambda spec, ranks: devices)
    wanted = {**config, "model": str(model), "compression_chunk": chunk}
    made = plan.make_plan(RunConfig.of(**wanted))
    assert made.summary[-1] == "kernels  triton (the device is a GPU)" + said
    adamw = plan.make_plan(RunConfig.of(**{**config, "distro": False}))
    assert not any(line.startswith("kernels") for line in adamw.summary)


def test_a_cpu_has_only_gloo(config: dict[str, object]) -> None:
    whole = RunConfig.of(**config, replicas=2, device="cpu", device_backend="split")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--device-backend split needs CUDA devices"):
        plan.make_plan(whole)


def test_a_checkpoint_that_does_not_fit_its_configuration(
    config: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "intermediate_size": 50}))
    with pytest.raises(ValueError, match=r"has the shape \[32, 48\], .* wants \[32, 50\]"):
        plan.make_plan(RunConfig.of(**config))  # type: ignore[arg-type]
    file.write_text(json.dumps({**settings, "rms_norm_eps": {"__float__": "big"}}))
    with pytest.raises(ValueError, match=r"config.json: .*rms_norm_eps"):
        plan.make_plan(RunConfig.of(**config))  # type: ignore[arg-type]


def test_a_cold_start_goes_on_where_a_run_does(tmp_path: Path) -> None:
    config = RunConfig.of(cold_start_warmup_steps=40, start_step=11, warmup_steps=0)
    saved = config.to_dict()
    for step in (20, 30):  # the second time it has been gone on with already
        manifest = Manifest(version=1, step=step, config=saved, data={}, machine={}, files=[])
        resumed = plan._from_start(
            RunConfig.of(resume="auto", cold_start_warmup_steps=40, warmup_steps=0),
            Start(tmp_path, manifest, ()),
        )
        assert resumed.schedule.start_step == step + 1
        rates = resumed.schedule.learning_rates()
        assert rates.get_lr(31) == config.schedule.learning_rates().get_lr(31) > 0
        assert rates.get_lr(11) == 0
        saved = resumed.to_dict()


def test_local_steps_that_end_in_no_model_are_said(config: dict[str, object]) -> None:
    local = {**config, "distro": False, "method": "sparseloco", "param_dtype": "float32"}
    run = {**local, "replicas": 2, "every": 7, "device": "cpu"}
    said = "\n".join(plan.make_plan(RunConfig.of(**run, total_steps=30)).summary)
    assert "--total-steps 30 is no multiple of 7" in said
    assert "the last 2 are in no model" in said
    assert "no multiple" not in "\n".join(
        plan.make_plan(RunConfig.of(**run, total_steps=28)).summary
    )


@pytest.mark.parametrize("fast", [True, False])
def test_the_parameters_type_is_settled_and_said(
    config: dict[str, object], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "cpu_multiplies_bf16", lambda: fast)
    made = plan.make_plan(RunConfig.of(**config, device="cpu"))  # type: ignore[arg-type]
    said = "\n".join(made.summary)
    assert made.resolved.model.param_dtype == ("bfloat16" if fast else "float32")
    assert made.config.model == made.resolved.model  # what the run directory says
    assert ("emulates products of bfloat16" in said) == (not fast)
    asked = RunConfig.of(**config, device="cpu", param_dtype="bfloat16")  # type: ignore[arg-type]
    assert (
        "warning  --param-dtype bfloat16: torch" in "\n".join(plan.make_plan(asked).summary)
    ) == (not fast)


@pytest.mark.parametrize("then", ["bfloat16", "float32"])
def test_a_run_that_goes_on_keeps_its_parameters_type(tmp_path: Path, then: str) -> None:
    saved = {**RunConfig.of().to_dict(), "param_dtype": then}
    manifest = Manifest(version=1, step=3, config=saved, data={}, machine={}, files=[])
    start = Start(tmp_path, manifest, ())
    assert plan._typed(RunConfig.of(), start, "cpu").model.param_dtype == then
    other = "float32" if then == "bfloat16" else "bfloat16"
    given = RunConfig.of(param_dtype=other)  # which `check_start` refuses
    assert plan._typed(given, start, "cpu").model.param_dtype == other
