"""A stand-in for Psyche's core: rank 0 with its trainer re-enacted from what is known of it.

Nothing of psyche_fast is used but the package `psyche` that a core imports by name, and the
sidecars, started as a core starts them. What rank 0 sends, which collectives it issues in which
order, and its arithmetic are written out here once more.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import free_port

C10_TYPE = {torch.uint8: 0, torch.float32: 6, torch.bool: 11, torch.bfloat16: 15}
KIND = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.int64: "Int64"}
Result = dict[str, Any]
"""`idx`, `val`, `xshape`, `totalk` of one parameter."""


class Trace(TorchDispatchMode):
    """Every collective of this rank: its name, and the elements and type of what it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does is seen then
        space, name = func._schema.name.split("::")
        # Work is waited for with operators of these namespaces too.
        if space in ("c10d", "_c10d_functional") and "wait" not in name and "monitor" not in name:
            tensors = [t for t in _flat(args) if isinstance(t, Tensor)]
            first = tensors[0] if tensors else torch.empty(0)
            most = max((t.numel() for t in tensors), default=0)
            self.log.append((name.strip("_"), most, first.dtype))
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


class Core:
    """Rank 0 of `dp * tp` ranks; with one it calls the model in its own process."""

    def __init__(self, dp: int, tp: int, folder: Path, path: str, cold: bool = False) -> None:
        self.dp, self.tp, self.world = dp, tp, dp * tp
        self.number = 0
        self.children: list[subprocess.Popen[bytes]] = []
        sys.path.insert(0, path)
        if self.world == 1:
            return
        port = free_port()
        environment = {**os.environ, "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}"}
        # A core does this while another of its threads waits in the store's constructor.
        for rank in range(1, self.world):
            log = open(folder / f"rank-{rank}.log", "wb")  # noqa: SIM115 - the child's
            command = [
                sys.executable, "-m", "psyche.sidecar", "--parent-pid", str(os.getpid()),
                "--backend", "gloo", "--init-method", f"tcp://0.0.0.0:{port}",
                "--world-size", str(self.world), "--rank", str(rank), "--device", str(rank),
            ]  # fmt: skip
            self.children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        patience = timedelta(hours=2)
        self.store = dist.TCPStore(
            host_name="0.0.0.0", port=port, world_size=self.world, is_master=True,
            timeout=patience, use_libuv=True,
        )  # fmt: skip
        dist.init_process_group(
            backend="gloo", store=self.store, world_size=self.world, rank=0, timeout=patience
        )

    # The model

    def load_files(self, files: list[Path], architecture: str = "HfAuto", **options: Any) -> None:
        psyche = importlib.import_module("psyche")
        if self.world > 1:
            self.store.set("architecture", architecture)
            self.store.set("source", "files")
            home = os.environ["HOME"]
            names = [str(f) for f in files]
            names = [f"~/{n[len(home) :]}" if n.startswith(home) else n for n in names]
            self.store.set("files", json.dumps(names))
        self._make(architecture, psyche.PretrainedSourceRepoFiles([str(f) for f in files]), options)

    def load_tensors(self, config: str, tensors: dict[str, Tensor], **options: Any) -> None:
        psyche = importlib.import_module("psyche")
        if self.world > 1:
            self.store.set("architecture", "HfAuto")
            self.store.set("source", "config_and_tensors")
            self.store.set("config", config)
            self.store.set("tensor_names", json.dumps(sorted(tensors)))
            dist.barrier()
            for name in sorted(tensors):
                self.store.set(f"tensor_shape_{name}", json.dumps(list(tensors[name].shape)))
                self.store.set(f"tensor_dtype_{name}", KIND[tensors[name].dtype])
                dist.broadcast(tensors[name].contiguous(), 0)
                dist.barrier()
        self._make("HfAuto", psyche.PretrainedSourceStateDict(config, tensors), options)

    def _make(self, architecture: str, source: Any, options: dict[str, Any]) -> None:
        if self.world > 1:
            self.store.set("dp", str(self.dp))
            self.store.set("tp", str(self.tp))
        attention, dtype = options.pop("attention", "sdpa"), options.pop("dtype", torch.float32)
        make = importlib.import_module("psyche").make_causal_lm
        self.model = make(
            architecture, source, "cpu", attention, self.dp, self.tp, 64, param_dtype=dtype
        )

    # Operations

    def hyperparameters(self, optimizer: Any, micro_batch: int = 2, lr: float = 0.01) -> None:
        schedule = {"Constant": {"base_lr": lr, "warmup_init_lr": 0.0, "warmup_steps": 0}}
        size = micro_batch * self.dp
        self._operation(
            operation="hyperparameters", lr_scheduler=schedule, optimizer=optimizer,
            micro_batch_size=size, grad_accum_in_fp32=False,
        )  # fmt: skip
        self.trainer = RustTrainer(self.model, optimizer, size, lr, self.tp == 1)

    def train(
        self,
        step: int,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        lengths: list[list[int]] | None = None,
        results: list[list[Result]] | None = None,
        zero_optim: bool = False,
        warmup: tuple[int, int] | None = None,
        cancel_before: int | None = None,
    ) -> tuple[float, list[Result] | None]:
        results = results or []
        rows = len(input_ids)
        batch = self._pad(input_ids, labels, position_ids, lengths)
        if self.world > 1:
            self._operation(
                operation="train", step=step, batch_id=[0, rows - 1], warmup_lr_between=warmup,
                zero_optim=zero_optim, results_len=len(results),
                results_metadata=_metadata(results), **_described(batch),
            )  # fmt: skip
            self._broadcast_results(results)
            self._broadcast_batch(batch)
        loss, own = self.trainer.train(step, batch, results, zero_optim, warmup, cancel_before)
        if self.world == 1:
            return loss, own
        summed = torch.tensor([loss])
        dist.all_reduce(summed)
        return float(summed) / self.world * len(batch[0]) / rows, own

    def optimize(
        self,
        step: int,
        results: list[list[Result]] | None = None,
        warmup: tuple[int, int] | None = None,
    ) -> None:
        results = results or []
        if self.world > 1:
            self._operation(
                operation="optimize", step=step, warmup_lr_between=warmup,
                results_len=len(results), results_metadata=_metadata(results),
            )  # fmt: skip
            self._broadcast_results(results)
        self.trainer.optimize(step, results, warmup)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, keep: int | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        batch = self._pad(input_ids, labels, None, None)
        if self.world > 1:
            fields = {"operation": "forward", "num_logits_to_keep": keep, "loss_scale": scale}
            self.store.set(str(self.number), json.dumps({**fields, **_described(batch)}))
            self.number += 1
            dist.barrier()
            self._broadcast_batch(batch)
        found: tuple[Tensor, Tensor | None] = self.model.forward(*batch, keep, scale)
        return found

    def extract(self) -> dict[str, Tensor]:
        self._operation(operation="extract")
        return self.trainer.extract()

    def truncate_bf16(self) -> None:
        self._operation(operation="truncate_bf16")
        self.trainer.truncate_bf16()

    def exit(self) -> list[int | None]:
        if self.world > 1:
            self.store.set(str(self.number), json.dumps({"operation": "exit"}))
            dist.barrier()
        return [child.wait(60) for child in self.children]

    def _operation(self, **fields: Any) -> None:
        if self.world == 1:
            return
        self.store.set(str(self.number), json.dumps(fields))
        self.number += 1
        # NCCL's barrier is an all-reduce; over gloo a core has to say what its sidecars say.
        dist.barrier()

    def _pad(self, input_ids: Tensor, labels: Any, position_ids: Any, lengths: Any) -> list[Any]:
        missing = -len(input_ids) % self.world
        length = input_ids.shape[1]

        def longer(tensor: Tensor | None, row: Tensor) -> Tensor | None:
            return None if tensor is None else torch.cat([tensor, row.expand(missing, length)])

        if lengths is not None:
            lengths = [*lengths, *[[length]] * missing]
        return [
            longer(input_ids, torch.zeros(length, dtype=torch.int64)),
            longer(labels, torch.full((length,), -100)),
            longer(position_ids, torch.arange(length)),
            lengths,
        ]

    @staticmethod
    def _broadcast_batch(batch: list[Any]) -> None:
        for tensor in batch[:3]:
            if tensor is not None:
                dist.broadcast(tensor, 0)

    @staticmethod
    def _broadcast_results(results: list[list[Result]]) -> None:
        for of_parameter in zip(*results, strict=True):
            dist.broadcast(torch.stack([r["idx"] for r in of_parameter]), 0)
            dist.broadcast(torch.stack([r["val"] for r in of_parameter]), 0)


def _described(batch: list[Any]) -> dict[str, Any]:
    return {
        "batch_shape": list(batch[0].shape),
        "batch_has_labels": batch[1] is not None,
        "batch_has_position_ids": batch[2] is not None,
        "batch_sequence_lengths": batch[3],
    }


def _metadata(results: list[list[Result]]) -> dict[str, Any]:
    names = ("sparse_idx_size", "sparse_idx_dtype", "sparse_val_size", "sparse_val_dtype")
    if not results:
        return dict.fromkeys([*names, "xshape", "totalk"])
    first = results[0]
    return {
        "sparse_idx_size": [list(r["idx"].shape) for r in first],
        "sparse_idx_dtype": C10_TYPE[first[0]["idx"].dtype],
        "sparse_val_size": [list(r["val"].shape) for r in first],
        "sparse_val_dtype": C10_TYPE[first[0]["val"].dtype],
        "xshape": [list(r["xshape"]) for r in first],
        "totalk": [r["totalk"] for r in first],
    }


def signs(result: list[Result]) -> list[Result]:
    """A result at one bit a value."""
    return [{**r, "val": r["val"].signbit()} for r in result]


class RustTrainer:
    """The trainer that is compiled into the core, over whatever model it is given."""

    def __init__(
        self, model: Any, optimizer: Any, micro_batch: int, lr: float, can_clip: bool
    ) -> None:
        self.helpers = importlib.import_module("psyche.dtensor_helpers")
        named = model.named_parameters()
        self.names = sorted(named)
        self.variables = [named[name] for name in self.names]
        self.model, self.micro_batch, self.lr, self.can_clip = model, micro_batch, lr, can_clip
        self.form, fields = next(iter(optimizer.items()))
        self.fields = {k: _float(v) for k, v in fields.items()}
        self.moments = [[torch.zeros_like(v.detach()) for _ in range(2)] for v in self.variables]
        self.steps = 0
        self.deltas = [
            self.helpers.zeros_like(v) if isinstance(v, DTensor) else torch.zeros_like(v.detach())
            for v in self.variables
        ]
        model.train()

    def _rate(self, step: int, warmup: tuple[int, int] | None) -> float:
        if warmup is None or not warmup[0] <= step <= warmup[1]:
            return self.lr
        return self.lr * ((step - warmup[0]) / (warmup[1] - warmup[0]))

    def train(
        self, step: int, batch: list[Any], results: list[list[Result]], zero_optim: bool,
        warmup: tuple[int, int] | None, cancel_before: int | None,
    ) -> tuple[float, list[Result] | None]:  # fmt: skip
        ids, labels, positions, lengths = batch
        count = math.ceil(len(ids) / self.micro_batch)
        lr, prev_lr = self._rate(step, warmup), self._rate(max(step - 1, 0), warmup)
        parts = [[None] * count if t is None else t.chunk(count) for t in (ids, labels, positions)]
        cuts = range(0, len(ids), self.micro_batch)
        rows = (
            [None] * count if lengths is None else [lengths[i : i + self.micro_batch] for i in cuts]
        )
        for variable in self.variables:
            self.helpers.zero_grad(variable)
        with torch.no_grad():
            if self.form == "Distro":
                if zero_optim:
                    for delta in self.deltas:
                        delta.zero_()
                for variable, delta in zip(self.variables, self.deltas, strict=True):
                    variable.sub_(delta.sign() * prev_lr)
        total = 0.0
        for number, (own, marks, at, row) in enumerate(zip(*parts, rows, strict=True)):
            if number == cancel_before:
                return total, None
            marks = own.clone() if marks is None else marks
            _, loss = self.model.forward(own, marks, at, row, None, float(count))
            assert type(loss) is Tensor, "the core knows no other"
            loss.backward()
            if math.isfinite(float(loss.detach())):
                total += float(loss.detach())
        with torch.no_grad():
            return total, self._generate(results, prev_lr, lr) if self.form == "Distro" else None

    def _clip(self) -> None:
        limit = self.fields["clip_grad_norm"]
        if limit is not None and limit > 0:
            assert self.can_clip, "Only pure FSDP supports `clip_grad_norm`"
            torch.nn.utils.clip_grad_norm_(self.variables[::-1], limit)

    def _generate(self, results: list[list[Result]], prev_lr: float, lr: float) -> list[Result]:
        self._clip()
        found = []
        for number, (variable, delta) in enumerate(zip(self.variables, self.deltas, strict=True)):
            variable.add_(delta.sign() * prev_lr)
            if results:
                sent = decode([r[number] for r in results], variable.dtype)
                if isinstance(variable, DTensor):
                    sent = self.helpers.calculate_local_tensor_from_full(sent, variable)
                delta.sub_(sent)
            if self.fields["weight_decay"]:
                variable.mul_(1.0 - lr * self.fields["weight_decay"])
            if self.fields["compression_decay"] != 1.0:
                delta.mul_(self.fields["compression_decay"])
            delta.add_(variable.grad * lr)
            whole = self.helpers.gather_full_tensor(delta) if isinstance(delta, DTensor) else delta
            chunk, topk = self.fields["compression_chunk"], self.fields["compression_topk"]
            found.append(encode(whole, int(chunk), int(topk)))
        return found

    @torch.no_grad()
    def optimize(
        self, step: int, results: list[list[Result]], warmup: tuple[int, int] | None
    ) -> None:
        lr = self._rate(step, warmup)
        if self.form == "AdamW":
            self._clip()
            self._adamw(lr)
        elif results:
            for number, variable in enumerate(self.variables):
                mean = decode([r[number] for r in results], variable.dtype)
                self.helpers.set_grad(variable, mean)
                variable.grad.sign_()
            for variable in self.variables:
                variable.add_(variable.grad, alpha=-lr)
                self.helpers.zero_grad(variable)

    def _adamw(self, lr: float) -> None:
        self.steps += 1
        (beta1, beta2), eps = self.fields["betas"], self.fields["eps"]
        for variable, (mean, square) in zip(self.variables, self.moments, strict=True):
            if variable.grad is None:
                continue
            if self.fields["weight_decay"]:
                variable.mul_(1 - lr * self.fields["weight_decay"])
            mean.mul_(beta1).add_(variable.grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(variable.grad, variable.grad, value=1 - beta2)
            divisor = (square.sqrt() / math.sqrt(1 - beta2**self.steps)).add_(eps)
            variable.addcdiv_(mean, divisor, value=-lr / (1 - beta1**self.steps))
            variable.grad = None

    @torch.no_grad()
    def extract(self) -> dict[str, Tensor]:
        return {
            n: (self.helpers.gather_full_tensor(v) if isinstance(v, DTensor) else v).clone()
            for n, v in zip(self.names, self.variables, strict=True)
        }

    @torch.no_grad()
    def truncate_bf16(self) -> None:
        for variable in self.variables:
            part = (
                self.helpers.local_tensor(variable) if isinstance(variable, DTensor) else variable
            )
            part.copy_(part.to(torch.bfloat16))


def _float(value: Any) -> Any:
    """Single precision, widened."""
    if isinstance(value, list):
        return [_float(v) for v in value]
    return float(torch.tensor(value, dtype=torch.float32)) if isinstance(value, float) else value


def _side(size: int, chunk: int) -> int:
    return max(d for d in range(1, size + 1) if size % d == 0 and (d <= chunk or size <= chunk))


def _basis(side: int, dtype: torch.dtype) -> Tensor:
    j = torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * j[:, None] + 1) * j[None] / (2 * side))
    matrix *= torch.where(j == 0, math.sqrt(1 / side), math.sqrt(2 / side))
    return matrix.to(dtype)


def encode(x: Tensor, chunk: int, topk: int) -> Result:
    """The largest coefficients of each chunk."""
    if x.dim() == 1:
        w = _side(len(x), chunk)
        coefficients = x.view(-1, w) @ _basis(w, x.dtype)
    else:
        (rows, columns), batch = x.shape[-2:], x.shape[:-2]
        h, w = _side(rows, chunk), _side(columns, chunk)
        cut = x.reshape(*batch, rows // h, h, columns // w, w).transpose(-3, -2)
        coefficients = _basis(h, x.dtype).T @ cut @ _basis(w, x.dtype)
    shape = list(coefficients.shape)
    flat = coefficients.flatten(-2) if x.dim() > 1 else coefficients
    total = flat.shape[-1]
    index = flat.abs().topk(min(topk, total)).indices
    values = flat.gather(-1, index)
    narrow = index.to(torch.uint8) if total <= 256 else index.to(torch.uint16).view(torch.uint8)
    return {"idx": narrow, "val": values, "xshape": shape, "totalk": total}


def decode(results: list[Result], dtype: torch.dtype) -> Tensor:
    """The mean of what several peers name."""
    first = results[0]
    index = torch.cat([r["idx"] for r in results], -1)
    index = (index if first["totalk"] <= 256 else index.view(torch.uint16)).long()
    values = [
        1 - 2 * r["val"].to(dtype) if r["val"].dtype == torch.bool else r["val"] for r in results
    ]
    dense = torch.zeros(first["xshape"], dtype=dtype)
    flat = dense.flatten(-2) if dense.dim() > 2 else dense
    flat.scatter_reduce_(-1, index, torch.cat(values, -1), "mean", include_self=False)
    dense = flat.view(first["xshape"])
    if dense.dim() == 2:
        return (dense @ _basis(dense.shape[1], dtype).T).flatten()
    h, w = dense.shape[-2:]
    cut = _basis(h, dtype) @ dense @ _basis(w, dtype).T
    *batch, down, across = dense.shape[:-2]
    return cut.transpose(-3, -2).reshape(*batch, down * h, across * w)


@contextmanager
def traced() -> Iterator[list[tuple[str, int, torch.dtype]]]:
    """The collectives that this rank issues in the block."""
    with Trace() as mode:
        yield mode.log
