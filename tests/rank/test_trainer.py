"""The trainer alone, on tiny models: what reaches the gradients and what does not."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from psyche_fast import config
from psyche_fast.batch import Batch
from psyche_fast.distro import DistroStep, exchange
from psyche_fast.distro.message import MessageFormat, Unpacking
from psyche_fast.distro.replicas import ReplicasDiffer
from psyche_fast.distro.verdict import Verdict
from psyche_fast.models import load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.counts import Totals, warn_of_refusal
from psyche_fast.rank.gradients import local_parts
from psyche_fast.rank.optimizers import Optimizer, make_optimizer
from psyche_fast.rank.topology import Topology
from psyche_fast.rank.trainer import Trainer, trainable
from psyche_fast.schedules import Constant
from tests.groups import run_ranks
from tests.tiny import random_tokens, save_llama

DISTRO = config.Optimizer(
    distro=True, compression_decay=0.9, compression_topk=4, compression_chunk=16,
    distro_quantization=True,
)  # fmt: skip
ADAMW = config.Optimizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def trainer(
    folder: Path,
    optimizer: config.Optimizer | None = None,
    *,
    micro: int = 2,
    topology: Topology | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Trainer:
    """A trainer of its own; without an optimiser gradients stay where they are, unclipped."""
    topology = topology or Topology()
    model = load_model(
        resolve_model(str(folder)), device=torch.device(device), param_dtype=dtype,
        shard_mesh=topology.shard_mesh, group=topology.copy,
    )  # fmt: skip
    schedule = Constant(base_lr=0.01, warmup_init_lr=0.0, warmup_steps=0)
    training = config.Training(micro_batch=micro, **{"check_every": 0, **options})
    if optimizer is None:
        return Trainer(model, topology, schedule, Optimizer(), training, 0.0)
    own = make_optimizer(optimizer, trainable(model), topology.peers)
    return Trainer(model, topology, schedule, own, training, optimizer.max_grad_norm)


def reference(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def grads(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("rows", [5, 6])
def test_every_real_token_weighs_the_same(folder: Path, rows: int) -> None:
    ids, labels = random_tokens(rows, 10), random_tokens(rows, 10, seed=1)
    labels[0, 3:] = -100
    labels[2] = -100
    tested = trainer(folder, micro=2)
    output = tested.train(1, Batch(ids, labels))
    model = reference(folder)
    loss = model(ids, labels=labels).loss
    loss.backward()
    assert float(output.loss) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert float(output.kept) == pytest.approx(1.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads(tested)[name], parameter.grad, rtol=1e-4, atol=1e-7)


def spoilt(
    monkeypatch: pytest.MonkeyPatch, tested: Trainer, number: int, by: Callable[[Tensor], Tensor]
) -> list[int]:
    """Spoils the loss of a forward, counted from 0; rows of all forwards are noted."""
    plain, calls = tested.model.loss, []

    def loss(batch: Batch) -> Tensor:
        calls.append(batch.rows)
        value = plain(batch)
        return by(value) if len(calls) - 1 == number else value

    monkeypatch.setattr(tested.model, "loss", loss)
    return calls


@pytest.mark.parametrize("optimizer", [DISTRO, ADAMW])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("by", [lambda loss: loss * torch.nan, lambda loss: loss + torch.inf])
def test_a_loss_that_is_not_finite_leaves_nothing_in_the_model(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: config.Optimizer,
    number: int,
    by: Callable[[Tensor], Tensor],
) -> None:
    ids, other = random_tokens(6, 10), random_tokens(6, 10, seed=1)
    tested, fresh = (trainer(folder, optimizer, micro=2) for _ in range(2))
    with monkeypatch.context() as patch:
        calls = spoilt(patch, tested, number, by)  # loss + inf has a finite gradient
        output = tested.train(1, Batch(ids))
    assert calls == [2, 2, 2]
    assert int(output.nonfinite_losses) == 1
    assert bool(output.refused)
    model = reference(folder)
    kept = torch.cat([ids[2 * n : 2 * n + 2] for n in range(3) if n != number])
    loss = float(model(kept, labels=kept).loss.detach()) * 4 / 6
    assert float(output.loss) == pytest.approx(loss, abs=1e-6)
    assert float(output.kept) == pytest.approx(4 / 6)
    tested.optimize(1)
    # What follows is what it would have been without the step.
    for step in (2, 3):
        one, another = (t.train(step, Batch(other)) for t in (tested, fresh))
        if optimizer is ADAMW:
            assert float(one.loss) == float(another.loss)
        for each in (tested, fresh):
            each.optimize(step)
    assert all(p.isfinite().all() for p in tested.parameters.values())
    if optimizer is ADAMW:
        assert_same(tested.parameters, fresh.parameters)


@pytest.mark.parametrize("optimizer", [DISTRO, ADAMW])
def test_a_gradient_that_is_not_finite_is_refused(
    folder: Path, optimizer: config.Optimizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="psyche_fast")  # whatever earlier tests have set
    tested = trainer(folder, optimizer)
    ids = random_tokens(2, 10)
    fine = tested.train(1, Batch(ids))
    warn_of_refusal(fine)
    assert not fine.refused
    assert not caplog.messages
    name, parameter = next(iter(tested.parameters.items()))
    hook = parameter.register_hook(lambda g: g * float("inf"))
    before = {n: p.detach().clone() for n, p in tested.parameters.items()}
    output = tested.train(2, Batch(ids))
    hook.remove()
    assert output.refused
    warn_of_refusal(output)
    assert caplog.messages == ["step 2: the gradient is not finite and is refused"]
    tested.optimize(2)
    after = tested.train(3, Batch(ids))
    assert all(p.isfinite().all() for p in tested.parameters.values())
    assert torch.isfinite(after.loss).all()
    if optimizer is ADAMW:
        assert all(torch.equal(before[n], p) for n, p in tested.parameters.items()), name


def test_forward_and_extract_see_the_plain_parameters(folder: Path) -> None:
    tested = trainer(folder, DISTRO)
    ids = random_tokens(4, 10)
    for step in (1, 2, 3):
        tested.train(step, Batch(ids))
        tested.optimize(step)
        model = reference(folder)
        model.load_state_dict(dict(tested.model.full_state_dict_iter()))
        with torch.no_grad():
            logits, loss = tested.model.forward(
                Batch(ids, labels=ids), num_logits_to_keep=2, loss_scale=2.0
            )
        expected = model(ids, labels=ids)
        torch.testing.assert_close(logits, expected.logits[:, -2:], rtol=1e-5, atol=1e-6)
        assert loss is not None
        assert float(loss) == pytest.approx(float(expected.loss) / 2, abs=1e-5)


def test_fp32_accumulation_is_nearer_to_fp32(folder: Path) -> None:
    ids = random_tokens(16, 12)
    exact = trainer(folder, micro=16)
    exact.train(1, Batch(ids))
    errors = {}
    for fp32 in (False, True):
        tested = trainer(folder, micro=1, dtype=torch.bfloat16, grad_accum_in_fp32=fp32)
        tested.train(1, Batch(ids))
        errors[fp32] = sum(
            float((g.float() - grads(exact)[n]).norm()) for n, g in grads(tested).items()
        )
    assert errors[True] < errors[False]


def test_norm_of_gradients_summed_up_in_fp32(folder: Path) -> None:
    tested = trainer(folder, micro=1, dtype=torch.bfloat16, grad_accum_in_fp32=True)
    output = tested.train(1, Batch(random_tokens(4, 10)))
    held = grads(tested)
    assert held.keys() == tested.parameters.keys()
    assert all(g.dtype == torch.float32 for g in held.values())
    exact = sum(float(g.double().square().sum()) for g in held.values()) ** 0.5
    assert float(output.grad_norm) == pytest.approx(exact, rel=1e-6)


def test_zero_optim_forgets_the_momentum(folder: Path) -> None:
    ids = random_tokens(2, 10)
    for optimizer in (ADAMW, DISTRO):
        fresh, used = (trainer(folder, optimizer) for _ in range(2))
        used.train(1, Batch(random_tokens(2, 10, seed=5)))
        if optimizer is ADAMW:
            used.optimize(1)
        for tested in (fresh, used):
            tested.plain()
            for name, parameter in reference(folder).named_parameters():
                tested.parameters[name].data.copy_(parameter.data)
        for tested in (fresh, used):
            tested.zero()
            tested.train(2, Batch(ids))
            if optimizer is ADAMW:
                tested.optimize(2)
                assert_same(tested.parameters, fresh.parameters)
            else:
                assert_same(tested._optimizer.momentum(), fresh._optimizer.momentum())


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)


class Slow(Future[Verdict]):
    """Results that are there, and agreed on, when that has been asked `asks` times, or waits."""

    def __init__(self, asks: float, said: list[str]) -> None:
        super().__init__()
        self._asks, self._said = asks, said

    def done(self) -> bool:
        self._asks -= 1
        return self._asks < 0

    def result(self, timeout: float | None = None) -> Verdict:
        self._said.append("there" if self._asks < 0 else "waits")
        return Verdict()


def _with_link(folder: Path, asks: float) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What happens in the fourth step, and the parameters after it."""
    tested = trainer(folder, DISTRO, micro=2)
    said: list[str] = []

    def spy(owner: type, name: str, word: str) -> mock._patch[object]:
        plain = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            said.append(word)
            return plain(*args, **options)

        return mock.patch.object(owner, name, call)

    def twice(message: torch.Tensor, peers: object) -> mock.Mock:
        return mock.Mock(bytes_sent=0, wait=lambda: torch.stack([message, message]))

    with (
        mock.patch.object(exchange, "start", twice),
        mock.patch.object(exchange, "Future", side_effect=lambda: Slow(asks, said)),
        spy(MessageFormat, "begin_unpack", "unpacks"),
        spy(Unpacking, "result", "checked?"),
        spy(type(tested.model), "loss", "forward"),
        spy(torch.Tensor, "backward", "backward"),
        spy(DistroStep, "compress", "compress"),
        spy(DistroStep, "update", "apply"),
    ):
        for step in (1, 2, 3, 4):
            said.clear()
            tested.train(step, Batch(random_tokens(4, 10, seed=step)))
            tested.optimize(step)
    return said, {n: p.detach().clone() for n, p in tested.parameters.items()}


def test_results_are_unpacked_once_they_are_there_and_waited_for_last(folder: Path) -> None:
    step = ["forward", "backward", "forward", "backward", "compress", "checked?", "apply"]
    found = {}
    # Where in the step the results are found to be there: between forwards and backwards, after
    # the last backward, or not before they are waited for.
    for asks, at in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4)):
        said, found[asks] = _with_link(folder, asks)
        assert said == [*step[:at], "there", "unpacks", *step[at:]]
    said, found[-1] = _with_link(folder, float("inf"))
    assert said == [*step[:5], "waits", "unpacks", *step[5:]]
    untrained = reference(folder).state_dict()
    assert any(not torch.equal(found[-1][n], untrained[n]) for n in untrained)
    for parameters in found.values():
        assert_same(parameters, found[-1])


def _replicas(rank: int, folder: Path, rows: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    topology = Topology.build(1, 1, torch.device("cpu"))
    tested = trainer(folder, DISTRO, topology=topology, check_every=1)
    losses = []
    for step in range(1, 7):
        batch = Batch(random_tokens(rows, 10, seed=step))
        output = tested.train(step, batch.share(rank, 2))
        losses.append(Totals(output, tested).wait().loss)
        tested.optimize(step)
    return losses, {n: p.detach().clone() for n, p in tested.parameters.items()}


def _split(rank: int, folder: Path) -> list[tuple[list[object], dict[str, torch.Tensor]]]:
    found = []
    for split in (False, True):
        topology = Topology.build(2, 1, torch.device("cpu"), split=split)
        assert (topology.everyone is not None) == split
        assert topology.peers is not None
        ranks = dist.get_process_group_ranks(topology.peers)
        assert ranks == [topology.shard, topology.shard + 2]
        tested = trainer(folder, DISTRO, topology=topology, check_every=1)
        counts: list[object] = []
        for step in (1, 2, 3):
            batch = Batch(random_tokens(4, 10, seed=step))
            totals = Totals(tested.train(step, batch.share(topology.replica, 2)), tested)
            tested.optimize(step)
            counts.append(totals.wait())
        parameters = local_parts(tested.parameters)
        found.append((counts, {n: p.detach().clone() for n, p in parameters.items()}))
    return found


def _debugging(rank: int, release: str) -> str:
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    with mock.patch.object(torch, "__version__", TorchVersion(release)):
        Topology.build(2, 1, torch.device("cpu"))
        try:
            Topology.build(1, 2, torch.device("cpu"))
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.processes
def test_checks_between_ranks_that_an_older_torch_does_not_have_are_refused() -> None:
    said = run_ranks(_debugging, 2, "2.11.0")
    assert said == [said[0]] * 2
    assert said[0].startswith("TORCH_DISTRIBUTED_DEBUG=DETAIL with tensor parallelism needs torch")
    assert "this is 2.11.0;" in said[0]
    assert run_ranks(_debugging, 2, "2.13.0") == ["", ""]


@pytest.mark.processes
def test_gloo_between_replicas_changes_nothing(folder: Path) -> None:
    for (counts, one), (again, other) in run_ranks(_split, 4, folder):
        assert counts == again
        assert counts[1].loss > 0  # type: ignore[attr-defined]
        assert counts[1].bytes_sent > 0  # type: ignore[attr-defined]
        assert_same(one, other)


def _lying(rank: int, folder: Path) -> tuple[list[str], bool]:
    topology = Topology.build(1, 1, torch.device("cpu"))
    tested = trainer(folder, DISTRO, topology=topology, check_every=1)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("psyche_fast").addHandler(handler)
    pack = MessageFormat.pack

    def damaged(self: MessageFormat, *arguments: Any) -> torch.Tensor:
        message = pack(self, *arguments)
        if rank == 1 and step == 2:
            message[-20] ^= 1
        return message

    before = {n: p.detach().clone() for n, p in tested.parameters.items()}
    with mock.patch.object(MessageFormat, "pack", damaged):
        for step in (1, 2, 3, 4):
            tested.train(step, Batch(random_tokens(2, 10, seed=step)))
            tested.optimize(step)  # compares the replicas' bits
    moved = any(not torch.equal(before[n], p) for n, p in tested.parameters.items())
    return [text for text in said if "refused" in text], moved


@pytest.mark.processes
def test_a_replica_that_sends_damaged_results_is_left_out_by_name(folder: Path) -> None:
    for said, moved in run_ranks(_lying, 2, folder):
        assert said == [
            "the result of replica 1 is refused: its checksum does not match its content"
        ]
        assert moved


def _diverging(rank: int, folder: Path, tp: int) -> str:
    topology = Topology.build(1, tp, torch.device("cpu"))
    tested = trainer(folder, DISTRO, topology=topology, check_every=2)
    for step in (1, 2, 3, 4, 5):
        tested.train(step, Batch(random_tokens(2, 10, seed=step)))
        if step == 3 and rank == 1:  # as a flipped bit of memory would
            tested.plain()
            tested.parameters["model.norm.weight"].data.view(torch.int32)[5] ^= 1
        try:
            tested.optimize(step)
        except ReplicasDiffer as error:
            return f"{step}: {error}"
    return "not found"


@pytest.mark.processes
@pytest.mark.parametrize(("tp", "who"), [(1, "replicas"), (2, "tensor-parallel ranks")])
def test_copies_that_diverge_end_the_run_on_every_rank(folder: Path, tp: int, who: str) -> None:
    for said in run_ranks(_diverging, 2, folder, tp):
        # Compared at step 4, and looked at a step later.
        assert said.startswith(f"5: step 4: {who} are no longer bit-identical in 1 of")
        assert "model.norm.weight" in said


@pytest.mark.processes
@pytest.mark.parametrize("rows", [4, 5])
def test_replicas_stay_bit_identical(folder: Path, rows: int) -> None:
    (losses, one), (_, other) = run_ranks(_replicas, 2, folder, rows)
    assert all(torch.equal(one[n], other[n]) for n in one)
    untrained = reference(folder).state_dict()
    assert any(not torch.equal(one[n], untrained[n]) for n in one)
    model = reference(folder)
    first = random_tokens(rows, 10, seed=1)
    assert losses[0] == pytest.approx(float(model(first, labels=first).loss), abs=1e-5)


class Operators(TorchDispatchMode):
    """The names of all operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _deferred(rank: int, folder: Path, bad: int | None) -> list[tuple[Any, ...]]:
    topology = Topology.build(2, 1, torch.device("cpu"))
    found: list[tuple[Any, ...]] = []
    for defer in (False, True):
        own = trainer(folder, topology=topology, micro=1, defer_grad_sync=defer)
        with pytest.MonkeyPatch.context() as patch, Operators() as operators:
            if bad is not None and rank == 1:
                spoilt(patch, own, bad, lambda loss: loss * torch.nan)
            output = own.train(1, Batch(random_tokens(6, 16)))
        reduced = sum("reduce_scatter" in name for name in operators.names)
        parts = local_parts({n: p.grad for n, p in own.parameters.items() if p.grad is not None})
        counts = (float(output.loss), int(output.nonfinite_losses), bool(output.refused))
        found.append((parts, counts, reduced))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("bad", [None, 1])
def test_deferred_gradients_are_the_same_with_one_reduction(folder: Path, bad: int | None) -> None:
    for each, deferred in run_ranks(_deferred, 2, folder, bad):
        assert deferred[1] == each[1]
        # Known on the rank whose loss was finite too.
        assert each[1][1:] == ((0, False) if bad is None else (1, True))
        assert deferred[0].keys() == each[0].keys()
        for name, gradient in each[0].items():
            torch.testing.assert_close(
                deferred[0][name], gradient, rtol=1e-4, atol=1e-6, equal_nan=True
            )
        # two blocks and what is left, for each of the micro-batches
        assert (each[2], deferred[2]) == (3 * 3, 3)


WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"}
WAITS |= {"nonzero", "masked_select", "unique", "is_nonzero", "equal", "allclose"}


class Waits(TorchFunctionMode):
    """Calls that would wait for a GPU, and who makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in WAITS:
            stack = reversed(traceback.extract_stack()[:-1])
            caller = next(f for f in stack if "/torch/" not in f.filename)
            # What stands in for the kernels on a CPU may look at its numbers.
            if "/kernels/reference/" not in caller.filename:
                self.found.append(f"{name} in {caller.filename}:{caller.lineno}")
        return func(*args, **(kwargs or {}))


PACKED = Batch(random_tokens(6, 16), sequence_lengths=[[16], [5, 11], [16], [16], [3, 6, 7], [9]])
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": ADAMW},
    "distro": {"optimizer": DISTRO, "optim_stats": True},
    "fp32 sums": {"optimizer": DISTRO, "grad_accum_in_fp32": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_host_waits_for_nothing_in_a_step(folder: Path, name: str) -> None:
    tested = trainer(folder, **OPTIONS[name])
    tested.train(1, PACKED)  # how the architecture keeps documents apart is tried once
    tested.optimize(1)
    # On the host, where looking at a batch waits for nobody.
    batches = [tested.model.prepare(b) for b in (Batch(random_tokens(5, 16)), PACKED)]
    with Waits() as waits:
        for step, batch in enumerate(batches, start=2):
            tested.train(step, batch)
        bool(torch.ones(1))
    assert len(waits.found) == 1, waits.found
    assert waits.found[0].startswith("__bool__ in " + __file__), "the one of the test itself"


def _waits_of_shards(rank: int, folder: Path) -> list[str]:
    topology = Topology.build(2, 1, torch.device("cpu"))
    tested = trainer(folder, DISTRO, topology=topology)
    tested.train(1, PACKED)
    batch = tested.model.prepare(PACKED)
    with Waits() as waits:
        tested.train(2, batch)
    return waits.found


@pytest.mark.processes
def test_the_host_waits_for_nothing_in_a_step_of_shards(folder: Path) -> None:
    assert run_ranks(_waits_of_shards, 2, folder) == [[], []]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_a_gpu_is_not_waited_for_in_a_step(folder: Path, name: str) -> None:
    tested = trainer(folder, device="cuda:0", **OPTIONS[name])
    for step in (1, 2, 3):  # compiles, fills pinned memory, tries the packed documents
        tested.train(step, PACKED)
        tested.optimize(step)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (4, 5):
            output = tested.train(step, PACKED)
            tested.optimize(step)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.isfinite(output.loss)
