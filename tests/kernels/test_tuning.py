"""Launch options: the table, users' files, and autotuning."""

from __future__ import annotations

import itertools
import time
import tomllib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.errors import TritonError

from psyche_fast.kernels import autotune, tuning
from psyche_fast.kernels.workloads import workload
from psyche_fast.start.devices import choose_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GPU = "Imaginary 9000"
DEFAULT = tuning.options("encode", CPU)


@pytest.fixture
def imaginary(monkeypatch):
    """A machine whose GPU is in no table."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)


def use(monkeypatch, path, text):
    path.write_text(text)
    monkeypatch.setenv(tuning.ENVIRONMENT, str(path))


@pytest.mark.usefixtures("imaginary")
def test_a_gpu_that_is_in_no_table_takes_the_defaults():
    assert tuning.options("encode", CUDA) == DEFAULT


@pytest.mark.usefixtures("imaginary")
def test_a_file_goes_before_the_shipped_table_and_a_gpu_before_its_defaults(monkeypatch, tmp_path):
    use(
        monkeypatch,
        tmp_path / "a.toml",
        "[default]\nencode = { maxnreg = 96, ctas_per_sm = 5 }\n"
        f'["{GPU}"]\nencode = {{ maxnreg = 104 }}\n["Other"]\nencode = {{ ctas_per_sm = 2 }}\n',
    )
    assert tuning.options("encode", CUDA) == {**DEFAULT, "maxnreg": 104, "ctas_per_sm": 5}
    assert tuning.options("encode", CPU) == {**DEFAULT, "maxnreg": 96, "ctas_per_sm": 5}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[default]\nencoder = { maxnreg = 96 }\n", ["default", "encoder", "encode"]),
        ("[default]\nencode = { registers = 96 }\n", ["encode.registers", "maxnreg (int)"]),
        ('["A"]\nencode = { maxnreg = "96" }\n', ["[A]", "encode.maxnreg", "'96'"]),
        ("[default]\nencode = { select_rows = 1 }\n", ["encode.select_rows", "bool"]),
        ("not TOML", ["a.toml"]),
    ],
)
def test_a_bad_file_is_refused_by_name(monkeypatch, tmp_path, text, names):
    use(monkeypatch, tmp_path / "a.toml", text)
    with pytest.raises(ValueError, match=r"a\.toml") as error:
        tuning.options("encode", CPU)
    for name in names:
        assert name in str(error.value)


def test_a_missing_file_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "none.toml"))
    with pytest.raises(ValueError, match=rf"{tuning.ENVIRONMENT}=.*none\.toml"):
        tuning.options("encode", CPU)


def test_what_is_written_is_read_again_beside_other_gpus(tmp_path):
    path = tmp_path / "table.toml"
    encode = {**DEFAULT, "select_rows": True, "keep": ""}
    autotune.write(path, "A", {"encode": encode, "lookahead": {"num_warps": 8}})
    autotune.write(path, 'B "quoted"', {"encode": DEFAULT})
    autotune.write(path, "A", {"lookahead": {"num_warps": 4}})
    assert tuning.read(path) == {
        "A": {"encode": encode, "lookahead": {"num_warps": 4}},
        'B "quoted"': {"encode": DEFAULT},
    }


def test_a_file_that_is_no_table_is_not_written_over(tmp_path):
    path = tmp_path / "notes.toml"
    path.write_text("[default]\nencode = { colour = 1 }\n")
    with pytest.raises(ValueError, match=r"encode\.colour"):
        autotune.write(path, "A", {"encode": DEFAULT})
    assert path.read_text() == "[default]\nencode = { colour = 1 }\n"


def test_everything_that_is_tried_is_an_option(tmp_path):
    shipped = tuning.read(tuning_table(tmp_path))["default"]
    assert set(autotune.SEARCH) == set(shipped)
    for kernel, groups in autotune.SEARCH.items():
        for changes in itertools.chain(*groups):
            path = tmp_path / "candidate.toml"
            path.unlink(missing_ok=True)
            autotune.write(path, GPU, {kernel: changes})
            assert tuning.read(path)[GPU][kernel] == changes


def tuning_table(tmp_path):
    from importlib.resources import files

    path = tmp_path / "shipped.toml"
    path.write_text(files("psyche_fast.kernels").joinpath("tuning.toml").read_text())
    return path


def test_autotuning_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        autotune.autotune(CPU)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("spec", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_the_gpu_to_tune_has_an_index(spec, index):
    assert choose_gpu(spec) == torch.device("cuda", index)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cpu", "--autotune needs a CUDA device, got --device cpu"),
        ("cuda:2", "--device cuda:2: this machine has 2 CUDA devices"),
        ("gpu", "--device: wanted auto, cpu, cuda"),
    ],
)
def test_what_is_no_gpu_to_tune_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        choose_gpu(spec)


def test_a_gpu_to_tune_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: this machine has no CUDA device"):
        choose_gpu("cuda")


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="no kernel 'decode' to tune; known are encode"):
        autotune.tune(CPU, ["decode"], 1.0, backend="interpret", chunks=1, timer=lambda c, d: 1.0)


def search(monkeypatch, milliseconds, *, settings, deadline=None):
    """`_search` over given settings with made-up times and bits."""
    monkeypatch.setitem(autotune.SEARCH, "encode", (tuple({"maxnreg": n} for n in settings),))
    table = {"encode": {"maxnreg": 128, "tiles": 4}}

    def attempt(options):
        outcome = milliseconds[options["maxnreg"]]
        if isinstance(outcome, Exception):
            raise outcome
        taken, bits = outcome
        return taken, [torch.tensor([bits])]

    if deadline is None:
        deadline = time.monotonic() + 60
    return table, list(autotune._search("encode", table, attempt, deadline))


def test_the_fastest_setting_with_the_same_bits_is_kept(monkeypatch):
    class NoRegisters(TritonError):
        pass

    table, trials = search(
        monkeypatch,
        {
            128: (1.0, 0.5),
            96: (0.8, 0.5),
            64: (0.1, 0.25),
            255: NoRegisters("out of registers\nsecond line"),
            168: (0.795, 0.5),  # not by a percent
        },
        settings=(96, 128, 64, 255, 168),
    )
    assert table == {"encode": {"maxnreg": 96, "tiles": 4}}
    assert [(t.changes, t.milliseconds, t.fault) for t in trials] == [
        ({}, 1.0, None),
        ({"maxnreg": 96}, 0.8, None),
        ({"maxnreg": 128}, 1.0, None),
        ({"maxnreg": 64}, 0.1, "other bits than without tuning"),
        ({"maxnreg": 255}, None, "out of registers"),
        ({"maxnreg": 168}, 0.795, None),
    ]


def test_a_setting_that_fails_is_a_trial_like_another(monkeypatch):
    """Whatever it is: an error of ours, of torch's or of the compiler's."""
    table, trials = search(
        monkeypatch,
        {128: (1.0, 0.5), 96: ValueError("no"), 64: RuntimeError(), 255: (0.5, 0.5)},
        settings=(96, 64, 255),
    )
    assert [t.fault for t in trials] == [None, "no", "RuntimeError", None]
    assert table["encode"]["maxnreg"] == 255


def test_a_kernel_that_fails_as_it_is_costs_the_others_nothing(monkeypatch):
    """It is left out of the table; where all are, that is an error."""

    def timer(call, device):
        if tuning.options("lookahead", device) == usual and broken[0]:
            raise RuntimeError("illegal address\nsecond line")
        return 1.0

    def workload(kernel, *arguments):
        broken[0] = kernel == "lookahead"
        return SimpleNamespace(run=None, bits=list)

    usual = tuning.options("lookahead", CPU)
    broken = [False]
    monkeypatch.setattr(autotune, "workload", workload)
    trials = []
    options = {"backend": "interpret", "chunks": 1, "timer": timer, "record": trials.append}
    table = autotune.tune(CPU, ["lookahead", "rows"], 60.0, **options)
    assert table == {"rows": tuning.options("rows", CPU)}
    assert (trials[0].kernel, trials[0].fault) == ("lookahead", "illegal address")
    assert {t.kernel for t in trials[1:]} == {"rows"}
    with pytest.raises(RuntimeError, match="lookahead: illegal address"):
        autotune.tune(CPU, ["lookahead"], 60.0, **options)


def test_minus_zero_is_not_zero(monkeypatch):
    table, trials = search(monkeypatch, {128: (1.0, 0.0), 96: (0.5, -0.0)}, settings=(96,))
    assert table["encode"]["maxnreg"] == 128
    assert trials[1].fault == "other bits than without tuning"


def test_at_the_deadline_the_best_so_far_is_kept(monkeypatch):
    table, trials = search(
        monkeypatch, {128: (1.0, 0.0), 96: (0.5, 0.0)}, settings=(96,), deadline=0.0
    )
    assert table["encode"]["maxnreg"] == 128
    assert [t.changes for t in trials] == [{}]


def test_tuning_runs_the_kernel_with_the_options_that_it_says(device, backend, capsys):
    """Through the interpreter (or on the GPU), with times that favour one setting."""
    in_force = []

    def timer(call, device):
        call()
        in_force.append(tuning.options("lookahead", device))
        return 1.0 - 0.1 * (in_force[-1]["ctas_per_sm"] == 12)

    trials = []
    found = autotune.tune(
        device, ["lookahead"], 60, backend=backend, chunks=2, timer=timer, record=trials.append
    )
    untuned = tuning.options("lookahead", device)
    assert found == {"lookahead": {**untuned, "ctas_per_sm": 12}}
    assert in_force[0] == untuned
    for options, trial in zip(in_force, trials, strict=True):
        assert options.items() >= trial.changes.items()
    assert len({tuple(options.items()) for options in in_force}) > 4
    assert [t.fault for t in trials] == [None] * len(trials)
    assert "ctas_per_sm = 12" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", sorted(autotune.SEARCH))
def test_a_workload_gives_the_same_bits_again_and_changes_its_state(device, backend, kernel):
    work = workload(kernel, torch.device(device.type), backend, 2)  # named without its index
    before = [t.clone() for t in work.state]
    first, second = work.bits(), work.bits()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(bool(t.isfinite().all()) for t in first if t.dtype.is_floating_point)
    for state, was in zip(work.state, before, strict=True):
        assert not torch.equal(state, was)
    assert len(first) > len(work.state) or kernel in ("apply", "lookahead", "outer")


@pytest.mark.gpu
def test_autotune_on_a_gpu(tmp_path, device):
    trials = []
    table = autotune.autotune(device, ["lookahead", "encode"], 20, record=trials.append)
    assert {t.kernel for t in trials} == {"lookahead", "encode"}
    assert min(t.milliseconds for t in trials if t.milliseconds is not None) > 0
    autotune.write(tmp_path / "t.toml", torch.cuda.get_device_name(), table)
    assert tuning.read(tmp_path / "t.toml")[torch.cuda.get_device_name()] == table


def test_shipped_table_is_what_options_gives():
    from importlib.resources import files

    text = files("psyche_fast.kernels").joinpath("tuning.toml").read_text()
    for kernel, options in tomllib.loads(text)["default"].items():
        assert tuning.options(kernel, CPU) == options
