"""What every optimiser of `torch.optim` can do, `DeMo` and `DisTrO` can do too."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from psyche_fast import DeMo, DisTrO

KINDS = [DeMo, DisTrO]
SETTINGS = {"compression_decay": 0.9, "compression_topk": 3, "compression_chunk": 8}
pytestmark = pytest.mark.parametrize("kind", KINDS)


class Model(torch.nn.Module):
    """A matrix and a bias that are compressed, a norm and an embedding for AdamW."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(12, 16, dtype=dtype)
        self.norm = torch.nn.LayerNorm(16, dtype=dtype)
        self.linear = torch.nn.Linear(16, 24, dtype=dtype)

    def loss(self, step):
        tokens = torch.randint(12, (8,), generator=torch.Generator().manual_seed(step))
        return self.linear(self.norm(self.embedding(tokens))).square().mean()

    def groups(self):
        dense = [*self.embedding.named_parameters("embedding"), *self.norm.named_parameters("norm")]
        return [
            {"params": list(self.linear.named_parameters("linear")), "weight_decay": 0.1},
            {"params": dense, "method": "adamw", "lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6},
        ]


def make(kind, dtype=torch.float32, **options):
    model = Model(dtype)
    return model, kind(model.groups(), lr=0.01, **{**SETTINGS, **options})


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def same(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_states_equal(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other["state"][key][name]), (key, name)


def test_the_references_arguments_stand_as_they_are(kind):
    """`lr` by name, and then in its order what follows the parameters; or `lr` first, as here."""
    p = torch.zeros(8, 8, requires_grad=True)
    expected = (0.5, 0.9, 3, 4, 0.1, None)
    names = ("compression_decay", "compression_topk", "compression_chunk", "weight_decay")
    by_name = dict(zip(names, expected[1:], strict=False))
    for optimizer in (
        kind([p], 0.9, 3, 4, 0.1, None, lr=0.5),
        kind([p], 0.5, 0.9, 3, 4, 0.1, None),
        kind([p], lr=0.5, process_group=None, **by_name),
        kind(params=[p], lr=0.5, fused=None, foreach=False, differentiable=False, **by_name),
    ):
        group = optimizer.param_groups[0]
        cut = group["compression_topk"], group["compression_chunk"]
        found = group["lr"], optimizer.compression_decay, *cut, group["weight_decay"]
        assert (*found, optimizer.process_group) == expected
    assert kind([p]).param_groups[0]["lr"] == 1e-3
    with pytest.raises(TypeError, match="compression_decay"):
        kind([p], 0.9, lr=0.5, compression_decay=0.9)


@pytest.mark.parametrize("flag", ["maximize", "capturable", "differentiable"])
def test_flags_that_cannot_be_had_are_refused(kind, flag):
    p, q = (torch.zeros(8, 8, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=f"{kind.__name__} does not take {flag}=True: "):
        kind([p], **{flag: True})
    optimizer = kind([p])
    for name in (flag, "amsgrad", "nesterov", "momentum"):
        with pytest.raises(ValueError, match=f"does not take {name}=True: "):
            optimizer.add_param_group({"params": [q], name: True})
    optimizer.add_param_group({"params": [q], "fused": True, "foreach": True, flag: False})
    with pytest.raises(TypeError, match="betas"):
        kind([p], betas=(0.9, 0.95))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "sgd"}, "method must be '.*' or 'adamw', got 'sgd'"),
        ({"method": "adamw", "betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"method": "adamw", "eps": -1.0}, "eps must be"),
        ({"method": "adamw", "lr": math.nan}, "lr must be a number"),
        ({"method": "adamw", "weight_decay": -1.0}, "weight_decay must be a number"),
        ({"method": "adamw", "compression_topk": 3}, "compression_topk is not for groups"),
        ({"betas": (0.9, 0.95)}, "betas is for groups with method='adamw'"),
    ],
)
def test_wrong_options_of_methods_are_named(kind, wrong, message):
    p, q = (torch.zeros(4, requires_grad=True) for _ in range(2))
    optimizer = kind([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], **wrong})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adamw_groups_are_torchs_adamw(kind, dtype):
    """To the bit, and so with missing gradients, which torch skips."""
    model, optimizer = make(kind, dtype)
    twin = Model(dtype)
    dense = [*twin.embedding.parameters(), *twin.norm.parameters()]
    adamw = torch.optim.AdamW(
        dense, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0, fused=True
    )
    for step in range(5):
        optimizer.zero_grad()
        model.loss(step).backward()
        for p, q in zip([*model.embedding.parameters(), *model.norm.parameters()], dense,
                        strict=True):  # fmt: skip
            q.grad = p.grad.clone()
        if step == 2:
            model.norm.bias.grad = dense[2].grad = None
        optimizer.step()
        adamw.step()
    for p, q in zip([*model.embedding.parameters(), *model.norm.parameters()], dense, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], adamw.state[q]["exp_avg_sq"])
        assert optimizer.state[p]["step"] == adamw.state[q]["step"]
        assert optimizer.state[p]["exp_avg"].device == p.device
    assert not torch.equal(model.linear.weight, Model(dtype).linear.weight)


@pytest.mark.parametrize("copier", ["state_dict", "torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_to_the_bit(kind, copier, dtype):
    """With what DisTrO has in flight; a state, once taken, is not the run's any more."""
    model, optimizer = make(kind, dtype)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(3):
        train(model, optimizer, [step])
        schedule.step()
    if copier in ("deepcopy", "pickle"):
        both = model, optimizer
        twin, other = (
            copy.deepcopy(both) if copier == "deepcopy" else pickle.loads(pickle.dumps(both))
        )
    else:
        twin, other = make(kind, dtype)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer) if copier == "torch.save" else copy.deepcopy(state)
        twin.load_state_dict(state["model"])
        other.load_state_dict(state["optimizer"])
    assert_states_equal(state_of(other), state_of(optimizer))
    assert repr(other) == repr(optimizer)
    other.defaults.pop("differentiable", None)  # which torch adds
    assert other.defaults == optimizer.defaults
    same(model, twin)
    for both in ((model, optimizer), (twin, other)):
        train(*both, range(3, 6))
    same(model, twin)
    assert_states_equal(state_of(other), state_of(optimizer))


def test_a_look_at_the_state_changes_nothing(kind):
    (model, optimizer), (twin, other) = make(kind), make(kind)
    for step in range(4):
        train(model, optimizer, [step])
        optimizer.state_dict()
        copy.deepcopy(optimizer)
        train(twin, other, [step])
    same(model, twin)


def test_a_state_of_a_replica_names_it(kind):
    model, optimizer = make(kind)
    train(model, optimizer, range(2))
    state = state_of(optimizer)
    assert "delta/replica-0" in state["state"][0]
    assert optimizer.state[model.linear.weight]["delta"].dtype == torch.float32
    for entry in state["state"].values():
        for name in [name for name in entry if name.endswith("/replica-0")]:
            entry[name.replace("-0", "-1")] = entry.pop(name)
    before = state_of(optimizer)
    with pytest.raises(ValueError, match=r"delta of .*linear.weight.* of replica 1.*replica 0"):
        optimizer.load_state_dict(state)
    assert_states_equal(state_of(optimizer), before)
    del state["state"][2]["exp_avg"]
    state["state"][0] = before["state"][0]
    state["state"][1] = before["state"][1]
    with pytest.raises(ValueError, match=r"exp_avg of parameter embedding.weight is missing"):
        optimizer.load_state_dict(state)


def test_hooks_are_called(kind):
    model, optimizer = make(kind)
    calls = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append("before"))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append("after"))
    train(model, optimizer, range(1))
    assert calls == ["before", "after"]
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    state = state_of(optimizer)
    assert state.pop("more") == 1
    assert calls[2:] == ["saving"]
    twin, other = make(kind)
    twin.load_state_dict(model.state_dict())
    renamed = {"mine": state}
    other.register_load_state_dict_pre_hook(lambda o, given: given["mine"])
    seen = []
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[twin.linear.weight]["delta"].clone())
    )
    other.load_state_dict(renamed)
    train(model, optimizer, range(1, 3))
    train(twin, other, range(1, 3))
    same(model, twin)
    assert torch.equal(seen[0], state["state"][0]["delta/replica-0"])


def test_schedules_of_torch_and_transformers_resume(kind):
    model, optimizer = make(kind)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))
    for step in range(3):
        train(model, optimizer, [step])
        schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(r / 4) for r in (0.01, 0.02)]
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.01, 0.02]
    _, other = make(kind)
    other.load_state_dict(state_of(optimizer))
    resumed = torch.optim.lr_scheduler.LambdaLR(other, lambda epoch: 1 / (1 + epoch), last_epoch=2)
    for s in (schedule, resumed):
        s.step()
    assert schedule.get_last_lr() == resumed.get_last_lr()
    cosine = get_cosine_schedule_with_warmup(make(kind)[1], 2, 10)
    assert cosine.get_last_lr() == [0.0, 0.0]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    rate = optimizer.param_groups[0]["lr"]
    for loss in (1.0, 2.0):
        plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == rate * 0.5
    with pytest.raises(ValueError, match="cycle_momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4, cycle_momentum=False)


def test_rates_may_be_tensors_that_schedules_change(kind):
    runs = []
    for as_tensor in (False, True):
        model = Model()
        groups = model.groups()
        groups[1]["lr"] = torch.tensor(0.02) if as_tensor else 0.02
        optimizer = kind(groups, lr=torch.tensor(0.01) if as_tensor else 0.01, **SETTINGS)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            train(model, optimizer, [step])
            schedule.step()
        runs.append(model)
    for p, q in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_a_scaler_unscales_and_leaves_out_what_overflows(kind):
    (model, optimizer), (twin, other) = make(kind), make(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model.loss(step)).backward()
        if step == 3:
            scaler.unscale_(optimizer)  # by the user, to clip
        if step == 2:
            model.linear.weight.grad[0, 0] = math.inf
            before, state = copy.deepcopy(model), state_of(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            same(model, before)
            assert_states_equal(state, state_of(optimizer))
            assert scaler.get_scale() == 2.0**9
        else:
            train(twin, other, [step])
    same(model, twin)
    assert int(optimizer.refused) == 0


def test_closures_and_accumulation(kind):
    (model, optimizer), (twin, other) = make(kind), make(kind)
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            loss = (model.loss(step) + model.loss(step + 10)) / 2
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        other.zero_grad(set_to_none=False)
        losses = [twin.loss(step), twin.loss(step + 10)]
        for one in losses:
            (one / 2).backward()
        other.step()
        assert loss.item() == pytest.approx(sum(one.item() for one in losses) / 2)
        assert loss.requires_grad
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    other.zero_grad(set_to_none=False)
    assert all(p.grad.count_nonzero() == 0 for p in twin.parameters())


def test_gradients_that_cannot_be_taken_are_named(kind):
    embedding = torch.nn.Embedding(8, 4, sparse=True)
    for method in (kind.method, "adamw"):
        optimizer = kind([{"params": list(embedding.named_parameters()), "method": method}])
        embedding.zero_grad()
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match=r"parameter weight has a sparse gradient.*sparse"):
            optimizer.step()
        p = torch.zeros(4, dtype=torch.complex64, requires_grad=True)
        with pytest.raises(ValueError, match=r"parameter phase .*complex64"):
            kind([{"params": [("phase", p)], "method": method}])


def test_parameters_come_and_go(kind):
    """Frozen ones stay, with their state; unfrozen and added ones join in; exchanged ones too."""
    model, optimizer = make(kind)
    model.norm.bias.requires_grad_(False)
    model.linear.bias.requires_grad_(False)
    if kind is DisTrO:
        optimizer.flush()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, range(3))
    for name, p in model.named_parameters():
        assert torch.equal(p, kept[name]) == (not p.requires_grad), name
    saved = state_of(optimizer)
    model.norm.bias.requires_grad_(True)
    model.linear.bias.requires_grad_(True)
    extra = torch.ones(8, 8, requires_grad=True)
    optimizer.add_param_group({"params": [("extra", extra)], "lr": 0.5})
    extra.grad = torch.ones(8, 8)
    for _ in range(3):
        model.loss(9).backward()
        optimizer.step()
    assert not torch.equal(extra, torch.ones(8, 8))
    assert not torch.equal(model.norm.bias, kept["norm.bias"])
    assert not torch.equal(model.linear.bias, kept["linear.bias"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved)
    other = torch.nn.Parameter(extra.detach().clone())  # as accelerate does it for FSDP2
    optimizer.param_groups[-1]["params"] = [other]
    other.grad = torch.ones(8, 8)
    before = other.detach().clone()
    for _ in range(2):
        model.loss(9).backward()
        optimizer.step()
    assert not torch.equal(other, before)
    assert len(optimizer.state_dict()["state"]) == 6


def test_gradients_of_none_count_as_zero(kind):
    model, optimizer = make(kind)
    twin, other = make(kind)
    optimizer.step()
    for p in twin.linear.parameters():
        p.grad = torch.zeros_like(p)
    other.step()
    same(model, twin)
