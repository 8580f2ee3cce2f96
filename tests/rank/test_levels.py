"""`--levels`: what it says, and what does not go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from psyche_fast import methods as m
from psyche_fast.config import RunConfig, read_toml
from psyche_fast.rank.levels import levels_of

THREE = "2:dense, 3:distro(k=2, chunk=32) ,2:sparseloco(every=15,outer-rate=0.7,values=codebook4)"


def run(levels: str, **values: Any) -> RunConfig:
    return RunConfig.of(levels=levels, param_dtype="float32", **values)


def test_levels_are_methods_with_the_runs_inner_options() -> None:
    found = levels_of(run(THREE, replicas=12, weight_decay=0.3, beta2=0.99))
    assert found == [
        (2, m.get("dense", outer=m.SGD())),
        (3, m.get("distro", k=2, chunk=32, outer=m.Sign(weight_decay=0.3))),
        (2, m.get("sparseloco", every=15, outer=m.SGD(rate=0.7), values="codebook4",
                  inner=m.AdamW(betas=(0.9, 0.99), weight_decay=0.3))),
    ]  # fmt: skip
    assert levels_of(run(THREE, simulate=12)) is not None
    alone = levels_of(run("2:dense", replicas=2, eps=1e-6))
    assert alone == [(2, m.get("dense", outer=replace(m.AdamW(), eps=1e-6)))]
    assert levels_of(RunConfig.of(method="dense")) is None


def test_a_file_may_have_them_as_a_list(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'param_dtype = "float32"\nsimulate = 4\n'
        '[exchange]\nlevels = ["2:dense", "2:sparseloco(every=30,k=64)"]\n'
    )
    config = RunConfig.of(**read_toml(str(path)))
    assert levels_of(config) == levels_of(run("2:dense,2:sparseloco(every=30)", simulate=4))
    path.write_text(config.to_toml())
    assert RunConfig.of(**read_toml(str(path))) == config


@pytest.mark.parametrize(
    ("levels", "values", "reason"),
    [
        ("2:dense", {"replicas": 4}, "are 2 replicas, --replicas is 4"),
        ("2:dense,2:diloco", {"simulate": 2}, "are 4 replicas, --simulate is 2"),
        ("dense", {}, "wanted 2:dense,2:distro,2:sparseloco"),
        ("2:dense;2:diloco", {}, "wanted 2:dense,2:distro,2:sparseloco"),
        ("2:dense(k=1", {}, "wanted 2:dense,2:distro,2:sparseloco"),
        ("", {}, "levels: wanted pairs"),
        ("0:dense", {}, "level 1: wanted a number of at least 1, got 0"),
        ("1:loco", {}, r"--levels: loco\(\): method: wanted one of distro"),
        ("1:diloco(often=3)", {}, r"--levels: diloco\(often=3\): .*often"),
        ("1:diloco(every)", {}, "'every' is no option=value of its own"),
        ("1:sparseloco(k=3,topk=4)", {}, "'topk=4' is no option=value of its own"),
        ("1:diloco(every=0)", {}, r"diloco\(every=0\): Expected `int` >= 1"),
        ("1:diloco(every=x)", {}, r"diloco\(every=x\)"),
        ("1:diloco(delay=500)", {}, "delay=500 must be less than"),
        ("1:diloco(every=4),1:sparseloco(every=6)", {}, "rounds of 6 steps are no multiple"),
        ("1:distro,1:dense", {}, "level 2 over level 1: what='gradient' takes gradients"),
        ("1:dense", {"method": "dense"}, "leave out --method"),
        ("1:dense", {"distro": True}, "leave out --distro"),
        ("1:dense", {"data_parallelism": 2}, "--levels want whole replicas"),
        ("2:dense", {"replicas": 2, "link": "1Mbit,1ms"}, "virtual clock's, for --simulate"),
        ("1:dense", {"param_dtype": "bfloat16"}, "wants --param-dtype float32"),
        ("1:dense", {"every": 3}, "--every needs --method"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(levels: str, values: dict[str, Any], reason: str) -> None:
    with pytest.raises((TypeError, ValueError), match=reason):
        levels_of(RunConfig.of(**{"levels": levels, "param_dtype": "float32", **values}))
