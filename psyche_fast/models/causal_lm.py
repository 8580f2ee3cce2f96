"""A causal language model as training uses it, whatever it is and however it is split."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from psyche_fast import compat
from psyche_fast.batch import IGNORE, Batch
from psyche_fast.models import document_attention as documents
from psyche_fast.models import head_loss, huggingface, packing
from psyche_fast.models.gathering import gather_whole
from psyche_fast.models.outputs import cross_entropy, field, targets_of
from psyche_fast.models.source import vocabulary_size

log = logging.getLogger(__name__)


class CausalLM:
    """One rank's part of a model.

    `loss` and `forward` take this rank's rows; under FSDP2 and tensor parallelism every rank of
    the replica has to call them alike, and backward with them.

    Attributes:
        module: the module; its parameters are distributed tensors where it is split.
        config: the configuration as plain data.
        architecture: as `load_model` was told.
        attn_implementation: what runs: `eager`, `sdpa` or `flash_attention_2` (for models
            that are not Transformers' what was asked for; it is theirs to honour).
        device: where it is.
        shard_mesh: the ranks of FSDP2, or None.
        tensor_mesh: the ranks of tensor parallelism, or None.
        masters: fp32 copies of the trained parameters of narrower types by name, placed as these
            are; empty where there are none. The optimiser works on them.

    Args:
        module, config, architecture, device, attn_implementation, shard_mesh, tensor_mesh,
        masters: as above.
        class_name: the module's class, whose name FSDP2 has changed.
        blocks: the names of its blocks (`parallel.blocks`), found before that.
        group: all ranks that hold parts of the model; None for one.
        fused_loss: whether the module computes the loss without logits (Liger).
        saved_as: a type, and the one that parameters of that type have in checkpoints.
        loss: `plain`, `chunked` (`head_loss`), or `auto`: chunked where whole logits would be large
            and the model does nothing to them.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        config: dict[str, Any],
        architecture: str,
        device: torch.device,
        attn_implementation: str,
        class_name: str,
        blocks: Iterable[str],
        shard_mesh: DeviceMesh | None = None,
        tensor_mesh: DeviceMesh | None = None,
        group: dist.ProcessGroup | None = None,
        fused_loss: bool = False,
        masters: Mapping[str, Tensor] | None = None,
        saved_as: tuple[torch.dtype, torch.dtype] | None = None,
        loss: str = "plain",
    ) -> None:
        self.module = module
        self.config, self.architecture, self.device = config, architecture, device
        self.attn_implementation = attn_implementation
        self.shard_mesh = shard_mesh
        self.tensor_mesh = tensor_mesh
        self.masters = dict(masters or {})
        self._saved_as = saved_as
        self._loss_kind = loss
        self._why_plain: str | None = None
        self._group = group
        self._class_name = class_name
        self._blocks = tuple(blocks)
        self._fused_loss = fused_loss
        self._keeps_documents_apart: bool | None = None
        self._by_documents = False
        self._seen: set[str] = set()

    @property
    def is_root(self) -> bool:
        """Whether this is the rank of its replica that full tensors are gathered on."""
        return self._group is None or dist.get_rank(self._group) == 0

    def train(self) -> None:
        """Training mode: dropout and activation checkpointing on."""
        self.module.train()

    def eval(self) -> None:
        """Evaluation mode."""
        self.module.eval()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in name order, tied ones once, under the model's own names."""
        self._reshard()
        return dict(sorted(self.module.named_parameters()))

    def all_but_matrices(self) -> set[str]:
        """Names of norms, biases and embeddings, which weight decay does no good."""
        modules = self.module.modules()
        tables = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
        named = self.module.named_parameters()
        return {name for name, p in named if p.dim() < 2 or id(p) in tables}

    def prepare(self, batch: Batch) -> Batch:
        """Checks a batch and makes its documents explicit; see `packing.prepare`.

        `loss` and `forward` do it too; doing it to a whole batch before it is cut finds errors
        before anything has changed. The first packed batch is preceded by tiny forwards that find
        out whether the architecture gives a document in a row what it gives it alone, so all ranks
        have to take part.

        Returns:
            the batch on this model's device; its `real_tokens()` are those that `loss` counts.
            Where it came from the host, nothing has waited for the device.

        Raises:
            ValueError: malformed, or packed for a model whose documents would see one another.
        """
        batch = packing.prepare(batch)
        if batch.position_ids is not None and self._keeps_documents_apart is None:
            self._keeps_documents_apart = self._go_by_documents() or self._probe_documents()
        if batch.position_ids is not None and not self._keeps_documents_apart:
            raise ValueError(
                f"{self._class_name} lets packed documents see one another, or counts positions "
                "its own way; train it without position_ids and sequence_lengths, one document a "
                "row"
            )
        return batch.to(self.device)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the labels that are not -100, shifted; labels default to inputs.

        Returns:
            fp32, 0-d; 0 with zero gradients where no label counts.

        Raises:
            ValueError: see `prepare`.
        """
        batch = self.prepare(batch)
        labels = batch.input_ids if batch.labels is None else batch.labels
        if self._fused_loss and self.module.training:
            count = (labels[:, 1:] != IGNORE).sum().clamp(min=1)
            output = self._call(batch, labels=labels, num_items_in_batch=count)
            return output.loss.float()
        counts = sum(batch.real_tokens()) > 0
        if self.goes_without_logits(batch):
            targets = targets_of(labels)
            with head_loss.instead_of_logits(self._head(), targets):
                output = self._call(batch, logits=False)
            return self._mean(field(output, "logits").sum(), targets, output)
        return self._loss(self._call(batch, labels=labels), labels, counts)

    @torch.no_grad()
    def summed_loss(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies that `loss` has the mean of, whatever routers add to that.

        Returns:
            float64, 0-d; 0 where no label counts.

        Raises:
            ValueError: see `prepare`.
        """
        batch = self.prepare(batch)
        labels = batch.input_ids if batch.labels is None else batch.labels
        count, targets = sum(batch.real_tokens()), targets_of(labels)
        if self._prefers_no_logits(batch):
            with head_loss.instead_of_logits(self._head(), targets):
                total = field(self._call(batch, logits=False), "logits").sum()
        else:
            output = self._call(batch, labels=labels)
            if isinstance(self.module, PreTrainedModel):
                total = cross_entropy(field(output, "logits"), targets)
            else:  # whose mean over nothing may be NaN
                total = field(output, "loss").float() * count if count else torch.zeros(())
        self._reshard()
        return total.to(self.device, torch.float64)

    def forward(
        self,
        batch: Batch,
        *,
        num_logits_to_keep: int | None = None,
        loss_scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and, where the batch has labels, the loss.

        Args:
            batch: `B` rows of `L` tokens.
            num_logits_to_keep: the last so many positions' logits (without labels no others are
                computed, where the model can do that); None or 0 for all.
            loss_scale: the loss is divided by it; None or 0 for not at all.

        Returns:
            logits `[B, L or fewer, V]`, and the loss as in `loss` or None.

        Raises:
            ValueError: see `prepare`.
        """
        has_labels = batch.labels is not None
        batch = self.prepare(batch)
        labels = batch.labels if has_labels else None
        keep = (num_logits_to_keep or 0) if labels is None else 0
        output = self._call(batch, labels=labels, keep=keep)
        if not torch.is_grad_enabled():
            self._reshard()
        logits = field(output, "logits")
        counts = sum(batch.real_tokens()) > 0
        loss = None if labels is None else self._loss(output, labels, counts)
        if num_logits_to_keep:
            logits = logits[:, -num_logits_to_keep:]
        if loss is not None and loss_scale:
            loss = loss / loss_scale
        return logits, loss

    def _reshard(self) -> None:
        """Drops the whole parameters that a forward without backward has left in FSDP2's root.

        They would be used again after the shards have changed.
        """
        if isinstance(self.module, FSDPModule):
            self.module.reshard()

    def goes_without_logits(self, batch: Batch) -> bool:
        """Whether the loss is computed in the head, chunk by chunk; all ranks decide alike."""
        return self.module.training and self._prefers_no_logits(batch)

    def _prefers_no_logits(self, batch: Batch) -> bool:
        if self._loss_kind == "plain":
            return False
        logits = 4 * batch.input_ids.numel() * (vocabulary_size(self.config) or 0)
        if self._loss_kind == "auto" and logits <= head_loss.plain_bytes(self.device.type):
            return False
        if self._why_plain is None:
            self._why_plain = self._find_why_plain()
            if self._why_plain and self._loss_kind == "auto" and logits > head_loss.PLAIN_BYTES:
                log.warning("all logits are held at once, at a price: %s", self._why_plain)
        if self._why_plain and self._loss_kind == "chunked":
            raise ValueError(f"--loss chunked: {self._why_plain}; use --loss plain")
        return not self._why_plain

    def _head(self) -> nn.Linear:
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(head, nn.Linear)
        return head

    @torch.no_grad()
    def _find_why_plain(self) -> str:
        """Why this model's loss needs its logits; empty where it does not."""
        module, name = self.module, self._class_name
        if not isinstance(module, PreTrainedModel):
            return f"{name} computes its loss itself"
        if self.tensor_mesh is not None:
            return "with --tensor-parallelism the head is split by vocabulary"
        if type(module.get_output_embeddings()).forward is not nn.Linear.forward:
            return f"the head of {name} is no plain linear layer"
        ids = torch.arange(1, 5, device=self.device)[None] % (vocabulary_size(self.config) or 5)
        was_training = module.training
        module.eval()  # nothing random
        with head_loss.marked_logits(self._head()) as given:
            logits = field(self._call(Batch(ids)), "logits")
        module.train(was_training)
        if len(given) != 1 or not _is_same(logits, *given[0]):
            return f"{name} changes its logits behind the head"
        return ""

    def _call(
        self, batch: Batch, labels: Tensor | None = None, *,
        logits: bool = True, keep: int = 0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        self._reshard()
        inputs, positions = batch.input_ids, batch.position_ids
        if not isinstance(self.module, PreTrainedModel):
            return self.module(inputs, labels=labels, position_ids=positions)
        kwargs |= {"use_cache": False, "return_dict": True}
        if "num_items_in_batch" in kwargs:
            kwargs["labels"] = labels
        if keep and "logits_to_keep" in signature(self.module.forward).parameters:
            kwargs["logits_to_keep"] = keep
        if positions is None:
            return self.module(input_ids=inputs, **kwargs)
        if self.attn_implementation == "flash_attention_2":
            lengths = packing.document_lengths(batch)
            boundaries = packing.flash_arguments(lengths, self.device)
        elif self._by_documents:
            lengths = packing.document_lengths(batch)
            boundaries = {"documents": documents.Documents(lengths, self._seen)}
        else:
            # With a cache or an attention mask Transformers would not look for packed documents.
            return self.module(input_ids=inputs, position_ids=positions, **kwargs)
        # Packed documents are one long row with its boundaries. Labels go along: the first of each
        # row is -100, so nothing is predicted from row to row.
        if kwargs.get("labels") is not None:
            kwargs["labels"] = kwargs["labels"].reshape(1, -1)
        if "logits_to_keep" in kwargs:
            places = torch.arange(inputs.numel(), device=self.device).reshape(inputs.shape)
            kwargs["logits_to_keep"] = places[:, -keep:].flatten()
        output = self.module(
            input_ids=inputs.reshape(1, -1),
            position_ids=positions.reshape(1, -1),
            **boundaries,
            **kwargs,
        )
        if logits and output.logits is not None:
            output.logits = output.logits.unflatten(1, (inputs.shape[0], -1)).squeeze(0)
        return output

    def _loss(self, output: Any, labels: Tensor, counts: bool) -> Tensor:
        """The mean over the labels that count; `counts` says whether there are any."""
        logits = field(output, "logits")
        if not isinstance(self.module, PreTrainedModel):
            if counts:
                return field(output, "loss").float()
            # Its mean over nothing may be NaN, yet backward has to run wherever it is collective.
            return logits.float().sum() * 0.0
        # Ours rather than the model's own, whose mean over no token at all is NaN.
        targets = targets_of(labels)
        return self._mean(cross_entropy(logits, targets), targets, output)

    def _mean(self, total: Tensor, targets: Tensor, output: Any) -> Tensor:
        count = (targets != IGNORE).sum()
        loss = total / count.clamp(min=1)
        balance = getattr(output, "aux_loss", None)
        if balance is not None:  # asked for by output_router_logits
            loss = loss + self._balance_coefficient() * balance * (count > 0)
        return loss

    def _balance_coefficient(self) -> float:
        """What the model multiplies its `aux_loss` by."""
        config: Any = self.module.config
        for owner in (self.module, config, config.get_text_config()):
            for name in ("router_aux_loss_coef", "aux_loss_coef"):
                value = getattr(owner, name, None)
                if isinstance(value, (int, float)):
                    return value
        raise ValueError(
            f"{self._class_name} does not say what its aux_loss is multiplied by; set "
            "output_router_logits to false in config.json"
        )

    def _go_by_documents(self) -> bool:
        """Changes to attention without masks for good, if the architecture goes along with it.

        For good, since recomputed activations want in backward what they had in forward.
        """
        module = self.module
        if self.attn_implementation != "sdpa" or not isinstance(module, PreTrainedModel):
            return False
        if not documents.takes_documents(module):
            return False
        module.set_attn_implementation(documents.SDPA_DOCUMENTS)
        self._by_documents = True
        if self._probe_documents() and documents.goes_without_mask(module, self._seen):
            return True
        module.set_attn_implementation("sdpa")
        self._by_documents = False
        return False

    @torch.no_grad()
    def _probe_documents(self) -> bool:
        """Whether a document's logits in a packed row are those that it has alone."""
        was_training = self.module.training
        self.module.eval()
        ids = torch.arange(1, 13, device=self.device).reshape(3, 4)
        ids = ids % (vocabulary_size(self.config) or 13)
        own = torch.arange(4, device=self.device)[None]

        def last(rows: Tensor, positions: Tensor | None) -> Tensor:
            row = rows.reshape(1, -1)
            packed = Batch(row, position_ids=positions, documents=[[4] * len(rows)])
            return field(self._call(packed, labels=row), "logits")[0, -4:].float()

        after = [last(ids[[first, 2]], own.repeat(1, 2)) for first in range(2)]
        counted, alone = last(ids[2:], own), last(ids[2:], None)
        self._reshard()
        self.module.train(was_training)
        # Expert models batch other tokens together when the first document changes, which rounds
        # otherwise, and attention over a longer row does so in every layer; anything beyond
        # rounding is a leak, or another count of positions.
        epsilon = torch.finfo(next(self.module.parameters()).dtype).eps
        return all(
            bool((one - two).abs().max() <= max(times * epsilon, 1e-4) * two.abs().max())
            for one, two, times in (
                (after[0], after[1], 2.5), (counted, alone, 2.5), (after[0], alone, 8)
            )
        )  # fmt: skip

    def kept(self) -> dict[str, Tensor]:
        """All that training changes: `parameter/NAME` (tied ones once), `master/`, `buffer/`."""
        buffers, parameters = dict(self.module.named_buffers()), self.named_parameters()
        kinds: dict[str, Mapping[str, Tensor]] = {
            "parameter": parameters, "master": self.masters, "buffer": buffers,
        }  # fmt: skip
        return {f"{kind}/{name}": t for kind, ts in kinds.items() for name, t in ts.items()}

    @torch.no_grad()
    def full_state_dict_iter(
        self, read: Callable[[str, Tensor], Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Gathers the whole model, piece by piece, in the form of the checkpoint it came from.

        Every rank of the replica has to go through all of it.

        Args:
            read: gives the tensors instead of the ranks: takes a name of `kept` and what is called
                so, and returns the whole of it on the CPU. One rank alone then goes through them.

        Yields:
            checkpoint name, and on `is_root` the full tensor on the CPU, None elsewhere; tied
            weights once. Never more than one transformer block is held at a time, and only one
            bucket of parts (`gathering`) where the checkpoint's form is the model's.
        """
        self._reshard()
        tensors = self.module.state_dict(keep_vars=True)
        tied = compat.tied_weights(self.module)
        first: dict[int, str] = {}
        for name in sorted(tensors, key=lambda name: name in tied):  # as save_pretrained names them
            first.setdefault(id(tensors[name]), name)
        names = [n for n in tensors if first[id(tensors[n])] == n]
        widened = {id(p): self.masters.get(n) for n, p in self.module.named_parameters()}
        # Buffers, and parameters that the architecture keeps in another type, stay what they are.
        of, to = self._saved_as or (None, None)
        casts = {n for n in names if id(tensors[n]) in widened and tensors[n].dtype == of}
        if to == torch.float32:
            masters = ((n, widened[id(tensors[n])]) for n in casts)
            tensors.update((n, master) for n, master in masters if master is not None)
        groups = list(self._groups(names))
        wanted = [tensors[name] for group in groups for name in group]
        if read is None:
            whole = gather_whole(wanted, self._group)
        else:
            kept = {id(tensor): name for name, tensor in self.kept().items()}
            whole = (read(kept[id(tensor)], tensor) for tensor in wanted)
        yielded: set[str] = set()
        for group in groups:
            for name, tensor in self._in_checkpoint_form(group, whole, casts):
                assert name not in yielded, f"{name} is made of parts in several groups"
                yielded.add(name)
                yield name, tensor

    def _in_checkpoint_form(
        self, group: list[str], whole: Iterator[Tensor], casts: set[str]
    ) -> Iterator[tuple[str, Tensor | None]]:
        # A generator of its own: what it holds is gone when the next group's bucket arrives.
        full = {name: next(whole) for name in group}
        if self._saved_as is not None:
            to = self._saved_as[1]
            full = {n: t.to(to) if n in casts else t for n, t in full.items()}
        if isinstance(self.module, PreTrainedModel):
            pairs = huggingface.revert(self.module, full)
            del full
        else:
            pairs = iter(full.items())
        for name, tensor in pairs:
            yield name, tensor if self.is_root else None

    def _groups(self, names: list[str]) -> Iterator[list[str]]:
        """What has to be converted together: the tensors of a block, where anything has."""
        module = self.module
        if not isinstance(module, PreTrainedModel) or not huggingface.needs_reverting(module):
            yield from ([name] for name in names)
            return
        prefixes = [f"{name}." for name in self._blocks]
        groups: dict[str, list[str]] = {}
        for name in names:
            key = next((prefix for prefix in prefixes if name.startswith(prefix)), name)
            groups.setdefault(key, []).append(name)
        yield from groups.values()

    def save_config(self, folder: Path) -> None:
        """Writes `config.json` into `folder`."""
        if isinstance(self.module, PreTrainedModel):
            dtype = None if self._saved_as is None else self._saved_as[1]
            huggingface.save_config(self.module, self._class_name, dtype, folder)
        else:
            (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def _is_same(logits: Tensor, given: Tensor, copy: Tensor) -> bool:
    if isinstance(logits, compat.FakeTensor):  # which has no content to compare
        return logits is given
    return torch.equal(logits.float(), copy.float())
