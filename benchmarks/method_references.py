"""The reference implementations' own steps, imported from where they are checked out.

Each is a `Side`: `prepare` brings gradients or local steps in, which takes no part in the time, and
`step` is what the reference does with them: all that the method does between the last backward (or
local step) and the parameters that the next forward sees.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RATE = 1e-3
DECAY = 0.95
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9


class Model(nn.Module):
    """Parameters and gradients or local progress that are the same every time."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(s, generator=generator).mul_(0.02) for s in shapes]
        self.weights = nn.ParameterList([nn.Parameter(t) for t in made])
        self.moves = [torch.randn(t.shape, generator=generator) for t in made]

    def gradients(self) -> None:
        """Give each parameter its gradient."""
        for p, move in zip(self.weights, self.moves, strict=True):
            p.grad = move.clone() if p.grad is None else p.grad.copy_(move)

    @torch.no_grad()
    def local_steps(self) -> None:
        """What local steps would have done."""
        torch._foreach_sub_(list(self.weights), self.moves, alpha=1e-3)


class Side:
    """One implementation of a method's step.

    Args:
        model: its parameters.
        is_local: whether `step` follows local steps, not a gradient.
        call: the step.
    """

    def __init__(self, model: Model, is_local: bool, call: Callable[[], Any]) -> None:
        self.model, self.step = model, call
        self.prepare = model.local_steps if is_local else model.gradients


def load(folder: Path, file: str, package: str | None = None) -> ModuleType:
    """A reference's module, by its path alone: its package may want what is not there."""
    path = folder / file
    name = package or f"reference_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} is not there: see --references")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def ccloco(folder: Path, shapes: list[tuple[int, ...]]) -> Side:
    """SparseLoCo, `tplr-ai/CCLoco`: `outer_step` of its strategy, 64 of each chunk, 4 bins.

    Without DCT it selects from whole rows (its chunks are flattened wrongly), that is 64 of 256 to
    3072 elements here.
    """
    optimizer_of = load(folder, "CCLoco/src/tplr/ccloco.py").CCLoco
    sys.modules.setdefault("tplr", types.ModuleType("tplr"))
    strategy = load(folder, "CCLoco/src/tplr/strategies.py").Diloco(None, 1, 0, None, None)
    model = Model(shapes)
    optimizer = optimizer_of(
        model.parameters(), lr=1.0, error_decay=DECAY, top_k=64, use_quantization=True,
        quantization_bins=4,
    )  # fmt: skip
    strategy.params_offloaded = [p.detach().clone() for p in model.parameters()]

    def step() -> None:
        strategy.outer_step(model, optimizer)
        strategy.params_offloaded = strategy._get_offloaded_param(model)

    return Side(model, True, step)


class _Manager:
    """What `DiLoCo` asks of torchft's manager, whose server is a compiled extension."""

    _use_async_quorum = False

    def register_state_dict_fn(self, *_: Any) -> None: ...
    def disallow_state_dict_read(self) -> None: ...
    def allow_state_dict_read(self) -> None: ...
    def start_quorum(self) -> None: ...

    def current_step(self) -> int:
        return 0

    def should_commit(self) -> bool:
        return True

    def allreduce(self, tensor: Tensor, should_quantize: bool = False) -> Any:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work


def torchft(folder: Path, shapes: list[tuple[int, ...]]) -> Side:
    """DiLoCo, `pytorch/torchft`: `prepare_sync` and `perform_sync`, all in float32.

    Its own quantisation (fp8) needs a GPU.
    """
    package, manager = types.ModuleType("torchft"), types.ModuleType("torchft.manager")
    manager.Manager = _Manager  # type: ignore[attr-defined]
    sys.modules.update({"torchft": package, "torchft.manager": manager})
    diloco = load(folder, "torchft/torchft/local_sgd.py").DiLoCo
    model = Model(shapes)
    outer = torch.optim.SGD(
        model.parameters(), lr=OUTER_RATE, momentum=OUTER_MOMENTUM, nesterov=True
    )
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    fragment = diloco(_Manager(), [model], inner, outer, sync_every=1)._fragments[0]

    def step() -> None:
        fragment.prepare_sync()
        fragment.perform_sync()

    return Side(model, True, step)


def muloco(bits: int) -> Callable[[Path, list[tuple[int, ...]]], Side]:
    """MuLoCo's outer step, `facebookresearch/MuLoCo`: all values in so many bits, with feedback."""

    def build(folder: Path, shapes: list[tuple[int, ...]]) -> Side:
        file = "MuLoCo/torchtitan/torchtitan/components/quantized_outer_sgd.py"
        optimizer_of = load(folder, file).QuantizedOuterSGD
        model = Model(shapes)
        model.gradients()
        optimizer = optimizer_of(
            model.parameters(), lr=OUTER_RATE, momentum=OUTER_MOMENTUM, nesterov=True,
            error_decay=DECAY, quantization_bins=1 << bits,
            simulate_quantization_after_reduce=False,
        )  # fmt: skip
        previous = {name: p.detach().clone() for name, p in model.named_parameters()}

        @torch.no_grad()
        def step() -> None:
            sent: dict[str, Any] = {}
            optimizer._save_grads(sent, previous, model)
            gathered = {}
            for name, tensor in sent.items():
                parts = [torch.empty_like(tensor)]
                dist.all_gather(parts, tensor)
                gathered[name] = parts
            for name, p in model.named_parameters():
                p.copy_(previous[name])
            optimizer._set_grads(gathered, model)
            optimizer.step()
            for name, p in model.named_parameters():
                previous[name].copy_(p)

        return Side(model, True, step)

    return build


def demo(folder: Path, shapes: list[tuple[int, ...]]) -> Side:
    """DeMo, `bloc97/DeMo`, 32 of each chunk."""
    model = Model(shapes)
    optimizer = load(folder, "DeMo/demo.py").DeMo(model.parameters(), lr=RATE)
    return Side(model, False, optimizer.step)


def random_k(folder: Path, shapes: list[tuple[int, ...]]) -> Side:
    """Random rows of the momentum, `schneiderkamplab/DeToNATION`, as many as sent elements ask.

    Alone it sends nothing at all, and gloo has no mean: it is told of two replicas, and the sum of
    one is taken for the mean.
    """
    timing = types.ModuleType("mltiming")
    timing.timing = None  # type: ignore[attr-defined]
    sys.modules.setdefault("mltiming", timing)
    package = types.ModuleType("detonation_repl")
    package.__path__ = [str(folder / "DeToNATION/detonation/repl")]
    sys.modules["detonation_repl"] = package
    base = "DeToNATION/detonation/repl"
    load(folder, f"{base}/replicator.py", "detonation_repl.replicator")
    module = load(folder, f"{base}/random_replicator.py", "detonation_repl.random_replicator")
    replicator = module.RandomReplicator(compression_rate=27 / 4096)
    model = Model(shapes)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=RATE)
    replicator.init(optimizer, dist.group.WORLD)
    replicator._replication_world_size = 2
    reduce = dist.all_reduce
    module.dist = types.SimpleNamespace(  # type: ignore[attr-defined]
        all_reduce=lambda t, op, group: reduce(t, group=group),
        ReduceOp=dist.ReduceOp,
    )

    @torch.no_grad()
    def step() -> None:  # the part of `DeToSGD.step` that is not about shards
        replicator.pre_step()
        for p in model.weights:
            state, group = optimizer.state[p], optimizer.param_groups[0]
            p.grad = replicator.replicate(p.grad, p, state, group).sign_()
        optimizer.step()
        replicator.post_step()

    return Side(model, False, step)


def torch_muon(folder: Path, shapes: list[tuple[int, ...]]) -> Side:
    """`torch.optim.Muon` for matrices beside `torch.optim.AdamW` for vectors."""
    model = Model(shapes)
    muon = torch.optim.Muon([p for p in model.weights if p.dim() == 2], lr=RATE)
    adamw = torch.optim.AdamW([p for p in model.weights if p.dim() < 2], lr=RATE)

    def step() -> None:
        muon.step()
        adamw.step()

    return Side(model, False, step)
