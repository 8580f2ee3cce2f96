"""Methods as data: names, fields, and what does not go together."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from psyche_fast import methods as m

NAMES = [
    "distro", "demo", "demo-v2", "sparseloco", "diloco", "streaming-diloco", "muloco", "random-k",
    "dense",
]  # fmt: skip


def test_names_are_those_that_users_write():
    assert m.known() == NAMES
    assert all(isinstance(m.get(name), m.Method) for name in NAMES)


def test_what_the_presets_are():
    sparse = m.get("sparseloco")
    assert (sparse.every, sparse.k, sparse.chunk, sparse.values) == (30, 64, 64, "2bit")
    assert (sparse.decay, sparse.feedback, sparse.merge) == (0.95, "sent", "named")
    assert (sparse.outer, sparse.transform) == (m.SGD(rate=1.0), "none")
    assert m.get("diloco").outer == m.Nesterov(rate=0.7, momentum=0.9)
    assert m.get("diloco").merge == "mean"
    assert m.get("demo-v2").subtract == 0.2
    assert m.get("distro").lookahead
    assert isinstance(m.get("muloco").inner, m.Muon)
    assert isinstance(m.get("dense").outer, m.AdamW)


def test_fields_are_overridden_and_the_rest_stays():
    method = m.get("sparseloco", every=15, outer=m.SGD(rate=0.7))
    wanted = dataclasses.replace(m.get("sparseloco"), every=15, outer=m.SGD(rate=0.7))
    assert method == wanted
    assert method != m.get("sparseloco")
    assert method.hash() == wanted.hash() != m.get("sparseloco").hash()
    assert pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.every = 3


def test_an_entry_point_adds_a_method(monkeypatch):
    class Point:
        name, value = "mine", "package:METHOD"

        def load(self):
            return m.get("diloco", every=7)

    monkeypatch.setattr("psyche_fast.methods.presets.entry_points", lambda group: [Point()])
    assert m.known() == [*NAMES, "mine"]
    assert m.get("mine", chunk=8) == m.get("diloco", every=7, chunk=8)
    monkeypatch.setattr(Point, "load", lambda self: 3)
    with pytest.raises(ValueError, match="method 'mine': package:METHOD is int"):
        m.get("mine")


LOCAL = {"what": "pseudo_gradient", "values": "2bit", "outer": m.SGD(), "inner": m.AdamW()}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**LOCAL, "inner": None}, "inner is wanted"),
        ({**LOCAL, "every": 7, "fragments": 2}, "no multiple"),
        ({**LOCAL, "every": 6, "fragments": 2, "delay": 3}, "delay=3 must be less than"),
        ({**LOCAL, "every": 1, "delay": 1}, "delay=1 must be less than"),
        ({**LOCAL, "values": "sign"}, "signs have no length"),
        ({**LOCAL, "outer": m.Sign()}, "outer=Sign goes by the schedule's rate"),
        ({**LOCAL, "outer": m.AdamW()}, "outer=AdamW goes by the schedule's rate"),
        ({**LOCAL, "outer": m.SGD(weight_decay=0.1)}, "belongs to inner"),
        ({**LOCAL, "gain": "one"}, "a factor in momentum"),
        ({**LOCAL, "lookahead": True, "every": 2, "delay": 1}, "lookahead"),
        ({"inner": m.AdamW()}, "inner takes local steps"),
        ({"every": 2}, "every=2 wants what='pseudo_gradient'"),
        ({"mix": "rebase"}, "mix='rebase' wants what='pseudo_gradient'"),
        ({"what": "gradient", "gain": "ema"}, "a factor in momentum"),
        ({"decay": 1.0}, "grow without bound"),
        ({"lookahead": True}, "lookahead"),
        ({"lookahead": True, "delay": 1, "outer": m.SGD()}, "lookahead"),
        ({"chunk": 4, "k": 17}, "k=17 is more than a chunk of 4 x 4 has"),
        ({"select": "random"}, "transform='none' is wanted"),
        ({"select": "all"}, "transform='none' is wanted"),
        ({"feedback": "sent"}, "how much was sent"),
        ({"values": "2bit", "feedback": "none", "subtract": 0.2}, "nothing to take out of"),
        ({"clip": "median"}, "all signs have one norm"),
        ({"values": "2bit", "chunk": 725, "k": 1 << 19}, "up to 524287 values of a chunk, got 52"),
        ({"outer": m.AdamW()}, "which signs have not"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"delay": -1}, "delay must be at least 0"),
        ({"decay": float("nan")}, "decay must be at least 0 and at most 1, got nan"),
        ({"subtract": 0.0}, "subtract must be above 0"),
        ({"values": "1bit"}, "values: wanted one of sign, 2bit"),
        ({**LOCAL, "every": 3, "mix": 1.5}, "mix must be"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_reason(fields, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        m.Method(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: m.Method(every=1.0), "every: wanted a whole number, got 1.0"),
        (lambda: m.Method(k=True), "k: wanted a whole number, got True"),
        (lambda: m.Method(decay="0.9"), "decay: wanted a number, got '0.9'"),
        (lambda: m.Method(mix="half"), "mix: wanted a number or \"rebase\", got 'half'"),
        (lambda: m.Method(outer="sgd"), "outer: wanted Sign, SGD"),
        (lambda: m.Method(lookahead=1), "lookahead: wanted True or False"),
        (lambda: m.get("diloco", inner="adamw"), "inner: wanted AdamW, Muon or None"),
        (lambda: m.get("diloco", topk=3), "no field 'topk'; wanted one of every"),
        (lambda: m.AdamW(betas=0.9), "betas: wanted two numbers"),
        (lambda: m.Muon(by_adamw="norm"), "by_adamw: wanted a tuple of names"),
    ],
)
def test_fields_of_another_type_are_type_errors(make, reason):
    with pytest.raises(TypeError, match=reason):
        make()


def test_numbers_of_steps_and_unknown_names_are_refused():
    for make, reason in [
        (lambda: m.get("loco"), "method: wanted one of distro, demo"),
        (lambda: m.SGD(rate=0), "SGD's rate must be above 0"),
        (lambda: m.Nesterov(momentum=1.0), "Nesterov's momentum must be at least 0 and below 1"),
        (lambda: m.AdamW(betas=(0.9, 1.0)), "AdamW's betas must be"),
        (lambda: m.Muon(adjust_lr_fn="none"), "adjust_lr_fn: wanted one of original"),
    ]:
        with pytest.raises(ValueError, match=reason):
            make()


def one(name="p", shape=(4, 4), dtype=torch.float32):
    return {name: torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)}


@pytest.mark.parametrize(
    ("parameters", "error", "reason"),
    [
        ({}, ValueError, "wanted some, got none"),
        (one(dtype=torch.int64), TypeError, "parameter p must be floating point"),
        (one(dtype=torch.bfloat16), ValueError, "local steps are lost to its rounding"),
    ],
)
def test_parameters_that_a_method_cannot_take(parameters, error, reason):
    with pytest.raises(error, match=reason):
        m.Replica(m.get("diloco"), parameters, replica=0, replicas=1)


def test_kernels_that_there_are_not_are_refused():
    method = m.get("diloco", chunk=128)
    with pytest.raises(ValueError, match="chunks are 96 x 128, the kernels take up to 4096 elem"):
        m.Replica(method, {"p": torch.zeros(96, 128)}, replica=0, replicas=1, backend="interpret")


def test_more_fragments_than_layers_are_refused():
    method = m.get("streaming-diloco", every=6, fragments=3)
    named = {"layers.0.w": torch.zeros(2), "layers.1.w": torch.zeros(2), "norm": torch.zeros(2)}
    with pytest.raises(ValueError, match="fragments=3 wants as many layers, got 2"):
        m.Replica(method, named, replica=0, replicas=1)
