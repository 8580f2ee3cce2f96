"""`--method`: runs by any of the methods, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from psyche_fast import methods as m
from psyche_fast.config import RunConfig
from psyche_fast.rank.method import method_of
from tests.core.test_resume import parameters, same, states, without_later
from tests.core.test_run import losses, start, train

FP32 = {"param_dtype": "float32"}


def test_flags_are_fields_of_the_method() -> None:
    run = RunConfig.of(
        **FP32, method="sparseloco", every=15, topk=32, chunk=32, values="codebook4", beta=0.9,
        merge="mean", norm_clip="median", reduce="gather", delay=2, mix="rebase", outer_rate=0.7,
        beta2=0.99,
        weight_decay=0.2, replicas=4,
    )  # fmt: skip
    assert method_of(run) == m.get(
        "sparseloco", every=15, k=32, chunk=32, values="codebook4", decay=0.9, merge="mean",
        clip="median", reduce="gather", delay=2, mix="rebase", outer=m.SGD(rate=0.7),
        inner=m.AdamW(betas=(0.9, 0.99), weight_decay=0.2),
    )  # fmt: skip
    dense = method_of(RunConfig.of(**FP32, method="dense", replicas=2))
    assert dense == m.get("dense", outer=m.AdamW())
    demo = method_of(RunConfig.of(**FP32, method="demo-v2", subtract=0.5, weight_decay=0.3))
    assert demo == m.get("demo-v2", subtract=0.5, outer=m.Sign(weight_decay=0.3))
    muloco = method_of(RunConfig.of(**FP32, method="muloco", outer_momentum=0.8))
    assert muloco is not None
    assert muloco.outer == m.Nesterov(rate=0.7, momentum=0.8)
    assert isinstance(muloco.inner, m.Muon)
    assert muloco.inner.weight_decay == 0.1


def test_distro_is_a_method_with_options_of_its_own() -> None:
    run = RunConfig.of(method="distro", distro_quantization=True, compression_topk=2, replicas=2)
    assert run.optimizer == RunConfig.of(
        distro=True, distro_quantization=True, compression_topk=2
    ).optimizer  # fmt: skip
    assert method_of(run) is None
    with_share = RunConfig.of(
        method="distro", subtract=0.2, topk=2, beta=0.995, values="parameter", replicas=2,
        weight_decay=0.0,
    )  # fmt: skip
    assert not with_share.optimizer.distro
    assert method_of(with_share) == m.get(
        "distro", subtract=0.2, k=2, decay=0.995, values="parameter"
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"every": 3}, "--every needs --method"),
        ({"method": "distro", "topk": 3}, "--topk is of other methods; DisTrO's options are"),
        ({"method": "dense", "distro": True}, "--distro and --method dense: give one of them"),
        (
            {"method": "dense", "param_dtype": "bfloat16", "master_dtype": "bfloat16"},
            "--method dense adds to float32 parameters or masters.* --master-dtype float32",
        ),
        (
            {"method": "sparseloco", "values": "codebook4", "data_parallelism": 2},
            "--values codebook4 codes all values of a parameter together, of which each rank has a",
        ),
        ({"method": "dense", "replicas": 2, "elastic": True}, "--elastic wants --method distro"),
        (
            {"method": "distro", "subtract": 0.2, "replicas": 2, "elastic": True},
            "--elastic wants --method distro, got it with --subtract",
        ),
        ({"replicas": 2}, "--replicas 2 needs --distro"),
        ({"method": "loco"}, "--method loco: method: wanted one of distro, demo"),
        ({"method": "sparseloco", "delay": 30}, "--method sparseloco: delay=30 must be less"),
        ({"method": "sparseloco", "mix": "half"}, "--method sparseloco: --mix: wanted a number"),
        ({"method": "dense", "outer_rate": 0.1}, "outer step, AdamW, has no --outer-rate"),
        ({"method": "sparseloco", "outer_momentum": 0.1}, "SGD, has no --outer-momentum"),
        ({"method": "diloco", "reduce": "owners", "values": "codebook4"}, "whole parameters, of"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        method_of(RunConfig.of(**{**FP32, **values}))


@pytest.mark.processes
def test_dense_replicas_are_adamw_on_all_rows(place: Path, tmp_path: Path) -> None:
    plain = ("--max-grad-norm", "0")
    alone = train(place, tmp_path / "alone", *plain)
    dense = train(
        place, tmp_path / "dense", *plain, "--method", "dense", "--values", "parameter",
        "--replicas", "2", ranks=2,
    )  # fmt: skip
    assert losses(dense) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(dense)[-1] < 0.9 * losses(dense)[0]
    assert dense[0]["bytes_sent"] > 4 * sum(
        t.numel() for t in parameters(tmp_path / "alone", 6).values()
    )


@pytest.mark.processes
def test_a_run_by_local_steps_goes_on_to_the_bit(place: Path, tmp_path: Path) -> None:
    """On shards, in bfloat16 with masters; in the middle of a round, with a message in flight."""
    arguments = (
        "--data-parallelism", "2", "--param-dtype", "bfloat16", "--save-dtype", "float32",
        "--method", "sparseloco", "--every", "3", "--delay", "1", "--mix", "rebase",
        "--chunk", "16", "--topk", "16", "--replicas", "2", "--checkpoint-every", "2",
        "--decay", "matrices",
    )  # fmt: skip
    whole = tmp_path / "whole"
    metrics = train(place, whole, *arguments, ranks=4)
    assert [line["bytes_sent"] > 0 for line in metrics] == [False, True, False] * 2
    assert [line["bytes_received"] for line in metrics] == [line["bytes_sent"] for line in metrics]
    assert losses(metrics)[-1] < losses(metrics)[0]
    # What is written is what replicas share, which changes with rounds alone.
    first = load_file(place / "model" / "model.safetensors")
    assert same(parameters(whole, 2), first)
    assert not same(parameters(whole, 6), first)
    resumed = without_later(whole, tmp_path / "resumed", 2)
    refused = start(place, resumed, *arguments[2:], "--resume", "auto", "--dry-run")
    assert "--resume: --data-parallelism 2 -> 1 since" in refused.stderr
    assert refused.returncode == 2
    train(place, resumed, *arguments, "--resume", "auto", ranks=4)
    assert same(parameters(whole, 6), parameters(resumed, 6))
    assert same(states(whole, 6), states(resumed, 6))
