"""A core that is not ours: rank 0 of Psyche's protocol in raw JSON and raw collectives.

Written from the protocol alone: all of psyche_fast that it uses is the sidecar that it starts. It
trains nothing itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import free_port

SCALAR_TYPE = {torch.uint8: 0, torch.float32: 6, torch.bool: 11, torch.bfloat16: 15}
TENSOR_DTYPE = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.int64: "Int64"}


class ForeignCore:
    """Rank 0: hosts the store, starts sidecars with the protocol's arguments, sends operations."""

    def __init__(self, world_size: int, log: Path) -> None:
        self.port = free_port()
        self.world_size = world_size
        self.number = 0
        # Before this process has threads, of which a forked one would have the locks alone.
        self.children = [self._fork(rank, log) for rank in range(1, world_size)]
        self.store = dist.TCPStore(
            "127.0.0.1", self.port, world_size, True, timedelta(seconds=60),
            wait_for_workers=False, use_libuv=True,
        )  # fmt: skip

    def _fork(self, rank: int, log: Path) -> Any:
        """A sidecar with the protocol's arguments; its output in `log`'s folder.

        Forked, so that it need not import everything once more.
        """
        arguments = [
            "--parent-pid", str(os.getpid()), "--backend", "gloo",
            "--init-method", f"tcp://127.0.0.1:{self.port}",
            "--world-size", str(self.world_size), "--rank", str(rank),
        ]  # fmt: skip
        process = multiprocessing.get_context("fork").Process(
            target=_sidecar, args=(arguments, str(log.with_name(f"rank-{rank}.log")))
        )
        process.start()
        return process

    def join(self) -> None:
        dist.init_process_group(
            "gloo", store=self.store, world_size=self.world_size, rank=0,
            timeout=timedelta(seconds=60),
        )  # fmt: skip

    def send_files(self, files: list[Path], architecture: str = "HfAuto") -> None:
        self.store.set("architecture", architecture)
        self.store.set("source", "files")
        self.store.set("files", json.dumps([str(f) for f in files]))

    def send_tensors(self, config: str, tensors: dict[str, torch.Tensor]) -> None:
        self.store.set("architecture", "HfAuto")
        self.store.set("source", "config_and_tensors")
        dist.barrier()
        self.store.set("config", config)
        self.store.set("tensor_names", json.dumps(sorted(tensors)))
        for name in sorted(tensors):
            self.store.set(f"tensor_shape_{name}", json.dumps(list(tensors[name].shape)))
            self.store.set(f"tensor_dtype_{name}", TENSOR_DTYPE[tensors[name].dtype])
            dist.broadcast(tensors[name].contiguous(), 0)
            dist.barrier()

    def parallelism(self, dp: int, tp: int) -> None:
        self.store.set("dp", str(dp))
        self.store.set("tp", str(tp))

    def operation(self, **fields: Any) -> None:
        self.raw(json.dumps(fields))

    def raw(self, text: str) -> None:
        self.store.set(str(self.number), text)
        self.number += 1
        dist.barrier()

    def hyperparameters(self, optimizer: Any, *, lr: float = 0.01, micro: int = 2) -> None:
        self.operation(
            operation="hyperparameters",
            lr_scheduler={"Constant": {"base_lr": lr, "warmup_init_lr": 0.0, "warmup_steps": 0}},
            optimizer=optimizer,
            micro_batch_size=micro,
            grad_accum_in_fp32=False,
        )

    @staticmethod
    def batch_fields(
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        sequence_lengths: list[list[int]] | None,
    ) -> dict[str, Any]:
        return {
            "batch_shape": list(input_ids.shape),
            "batch_has_labels": labels is not None,
            "batch_has_position_ids": position_ids is not None,
            "batch_sequence_lengths": sequence_lengths,
        }

    @staticmethod
    def broadcast_batch(*tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                dist.broadcast(tensor, 0)

    @staticmethod
    def metadata(results: list[list[Any]]) -> dict[str, Any] | None:
        if not results:  # as Psyche writes it for an empty list
            names = ("idx_size", "idx_dtype", "val_size", "val_dtype")
            return dict.fromkeys([*(f"sparse_{n}" for n in names), "xshape", "totalk"])
        first = results[0]
        return {
            "sparse_idx_size": [list(r.sparse_idx.shape) for r in first],
            "sparse_idx_dtype": SCALAR_TYPE[first[0].sparse_idx.dtype],
            "sparse_val_size": [list(r.sparse_val.shape) for r in first],
            "sparse_val_dtype": SCALAR_TYPE[first[0].sparse_val.dtype],
            "xshape": [list(r.xshape) for r in first],
            "totalk": [r.totalk for r in first],
        }

    @staticmethod
    def broadcast_results(results: list[list[Any]]) -> None:
        for entries in zip(*results, strict=True):
            dist.broadcast(torch.stack([r.sparse_idx for r in entries]), 0)
            dist.broadcast(torch.stack([r.sparse_val for r in entries]), 0)

    def train(
        self,
        step: int,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        sequence_lengths: list[list[int]] | None = None,
        results: list[list[Any]] | None = None,
        zero_optim: bool = False,
    ) -> float:
        """Returns the mean over the ranks that train of what they add to the loss all_reduce."""
        results = results or []
        self.operation(
            operation="train", step=step, zero_optim=zero_optim, batch_id=[0, len(input_ids) - 1],
            warmup_lr_between=None, results_len=len(results),
            results_metadata=self.metadata(results),
            **self.batch_fields(input_ids, labels, position_ids, sequence_lengths),
        )  # fmt: skip
        self.broadcast_results(results)
        self.broadcast_batch(input_ids, labels, position_ids)
        loss = torch.zeros(1)
        dist.all_reduce(loss)
        return float(loss) / (self.world_size - 1)

    def optimize(self, step: int, results: list[list[Any]] | None = None) -> None:
        results = results or []
        self.operation(
            operation="optimize", step=step, warmup_lr_between=None, results_len=len(results),
            results_metadata=self.metadata(results),
        )  # fmt: skip
        self.broadcast_results(results)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        self.operation(
            operation="forward", num_logits_to_keep=None, loss_scale=None,
            **self.batch_fields(input_ids, labels, None, None),
        )  # fmt: skip
        self.broadcast_batch(input_ids, labels)

    def exit(self) -> list[int]:
        self.operation(operation="exit")
        dist.destroy_process_group()
        return self.exit_codes()

    def exit_codes(self) -> list[int]:
        for child in self.children:
            child.join(60)
        return [child.exitcode for child in self.children]


def _sidecar(arguments: list[str], output: str) -> None:
    from psyche_fast import sidecar

    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    sidecar.main(arguments)
    os._exit(0)  # gloo's threads may abort at Python's own end
