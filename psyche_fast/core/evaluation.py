"""Held-out loss, bits per byte and samples during training, as rank 0 leads them.

Replica 0 alone evaluates, on the parameters that all replicas share: nothing crosses a link, and
the numbers are the same however many replicas there are. Nothing of it is left in what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import transformers

from psyche_fast.batch import IGNORE, Batch
from psyche_fast.config import RunConfig
from psyche_fast.core import feed
from psyche_fast.data import (
    BlockCache,
    Dataset,
    DummyDataset,
    bytes_of_tokens,
    collate,
    load_tokenizer,
    open_dataset,
)
from psyche_fast.locations import is_mixture, scheme, shown
from psyche_fast.metrics import MetricsWriter, PhaseTimer
from psyche_fast.models.source import FilesSource
from psyche_fast.rank import evaluation as ranks
from psyche_fast.rank.protocol import Continue, Evaluate, Train, hand_on
from psyche_fast.rank.trainer import Trainer


@dataclass(frozen=True)
class Held:
    """What is held out and what is continued, looked at before a run starts.

    Attributes:
        dataset: of `--eval-data`, opened; None without.
        sequences: of it that are evaluated.
        token_bytes: bytes of text by token; None where nobody knows.
        prompts: token ids of `--sample-prompt`, one or more each.
        tokenizer: of the model or its data; None where there is none.
        notes: lines for the user.
    """

    dataset: Dataset | None = None
    sequences: int = 0
    token_bytes: np.ndarray | None = None
    prompts: tuple[list[int], ...] = ()
    tokenizer: transformers.PreTrainedTokenizerFast | None = None
    notes: tuple[str, ...] = ()


def look_at(config: RunConfig, source: FilesSource, vocabulary: int | None) -> Held:
    """Opens what `--eval-data` names, and reads prompts with the tokenizer.

    Args:
        config: the run.
        source: the model's files.
        vocabulary: token ids that the model knows; None if that is not known.

    Raises:
        ValueError: what is wrong, with its flag.
        OSError: data that cannot be read.
    """
    options = config.evaluation
    if options.eval_data is None and not options.samples_every:
        return Held()
    dataset, sequences = None, 0
    if options.eval_data is not None:
        dataset = _open(config, options.eval_data, vocabulary)
        if isinstance(dataset, DummyDataset) and not options.eval_sequences:
            raise ValueError("--eval-sequences 0 with --eval-data dummy:, which has no end")
        sequences = min(options.eval_sequences or len(dataset), len(dataset))
    try:
        tokenizer = _tokenizer(config, source)
    except ValueError as error:
        if options.samples_every:
            raise ValueError(f"--samples-every: {error}") from error
        return Held(dataset, sequences, notes=(f"held out loss alone, no bits per byte: {error}",))
    prompts = tuple(
        tokenizer(prompt, add_special_tokens=False).input_ids for prompt in options.sample_prompt
    )
    for prompt, ids in zip(options.sample_prompt, prompts, strict=True):
        most = config.model.sequence_length - options.sample_tokens
        if not 1 <= len(ids) <= most:
            raise ValueError(
                f"--sample-prompt {prompt!r} has {len(ids)} tokens, wanted 1 to {most}: with "
                f"--sample-tokens {options.sample_tokens} it has to fit in --sequence-length "
                f"{config.model.sequence_length}"
            )
    notes, token_bytes = [], None
    if dataset is not None:
        token_bytes, of = bytes_of_tokens(tokenizer), f"{sequences} of {len(dataset)} sequences"
        if isinstance(dataset, DummyDataset):
            of = f"{sequences} sequences"
        unknown = "" if token_bytes is not None else ", no bits per byte with such a tokenizer"
        every = f"every {options.eval_every} steps and " if options.eval_every else ""
        assert options.eval_data is not None
        where = f"{every}at the first and the last step{unknown}"
        notes.append(f"held out {shown(options.eval_data)}: {of}, {where}")
    return Held(dataset, sequences, token_bytes, prompts, tokenizer, tuple(notes))


def _open(config: RunConfig, path: str, vocabulary: int | None) -> Dataset:
    data = config.data
    try:
        dataset = open_dataset(
            path,
            token_size=data.token_size,
            sequence_length=config.model.sequence_length,
            cache=BlockCache(data.data_cache, int(data.data_cache_gb * 1e9)),
        )
        if vocabulary is not None:
            dataset.check_vocabulary(vocabulary)
    except (ValueError, OSError) as error:  # they speak of the flag that is usual
        raise type(error)(str(error).replace("--data-path", "--eval-data")) from error
    return dataset


def _tokenizer(config: RunConfig, source: FilesSource) -> transformers.PreTrainedTokenizerFast:
    """The model's own, or the one that `tokenize` has left beside its data."""
    folders = [source.files[0].parent] if source.files else []
    for path in (config.evaluation.eval_data, config.data.data_path):
        if path is not None and scheme(path) is None and not is_mixture(path):
            folders.append(Path(path).expanduser() / "tokenizer")
    for folder in folders:
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            return load_tokenizer(folder)
    raise ValueError(
        f"no tokenizer in {config.model.model} (--model), nor in a folder `tokenizer` of the data"
    )


class Evaluation:
    """Evaluates when a step wants it.

    Args:
        held: what.
        config: the run, resolved.
        trainer: rank 0's own.
        timer: its phases are `evaluate` and `sample`.
        output: the run directory, whose `samples.jsonl` takes samples.
        vocabulary: token ids that the model knows; None if that is not known.

    Attributes:
        longest: seconds that evaluations and samples after one step have taken at most.
    """

    def __init__(
        self,
        held: Held,
        config: RunConfig,
        trainer: Trainer,
        timer: PhaseTimer,
        output: Path,
        vocabulary: int | None,
    ) -> None:
        self._held, self._options, self._trainer = held, config.evaluation, trainer
        self._timer, self._vocabulary = timer, vocabulary
        # A run that goes on has done the first one.
        self._first = 1 if config.run.resume is not None else config.schedule.start_step
        self._rows = config.training.micro_batch * trainer.topology.dp
        self.longest = 0.0
        self._file: MetricsWriter | None = None
        if held.prompts:
            first = config.schedule.start_step
            self._file = MetricsWriter(output / "samples.jsonl", drop_from_step=first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def after(self, step: int, *, last: bool) -> dict[str, Any]:
        """What is to be known after a step, of its line in `metrics.jsonl`: maybe nothing.

        `eval_loss` (nats per token), `eval_bits_per_byte`, `samples`.

        Args:
            step: the step.
            last: the run ends with it as planned, by its steps or its time.

        Raises:
            ValueError: a sequence that the model cannot take.
            OSError: one that cannot be read.
        """
        options, began = self._options, time.perf_counter()
        fields: dict[str, Any] = {}
        every, always = options.eval_every, last or step == self._first
        if self._held.dataset is not None and (always or (every and step % every == 0)):
            with self._timer.phase("evaluate"):
                fields |= self._evaluate(step)
        if self._file is not None and (last or step % options.samples_every == 0):
            with self._timer.phase("sample"):
                fields["samples"] = samples = self._sample(step)
                for one in samples:
                    self._file.write({"step": step, **one})
        if fields:
            self.longest = max(self.longest, time.perf_counter() - began)
        return fields

    def _evaluate(self, step: int) -> dict[str, float]:
        total, tokens, size = 0.0, 0, 0
        for batch in self._batches():
            try:
                feed.check(step, batch, self._vocabulary)
            except ValueError as error:
                raise ValueError(str(error).replace("--data-path", "--eval-data")) from error
            rows = Train.of(step, batch)
            hand_on(Evaluate(rows), self._trainer.topology)
            total += ranks.evaluate(self._trainer, rows.batch())
            labels = batch.input_ids if batch.labels is None else batch.labels
            counted = labels[:, 1:][labels[:, 1:] != IGNORE].numpy()
            tokens += counted.size
            if self._held.token_bytes is not None:
                # Ids behind the tokenizer's are of no text: models have room for more.
                known = counted[counted < len(self._held.token_bytes)]
                size += int(self._held.token_bytes[known].sum())
        fields = {"eval_loss": total / tokens if tokens else math.nan, "eval_tokens": tokens}
        if size:
            fields |= {"eval_bits_per_byte": total / math.log(2) / size, "eval_bytes": size}
        return fields

    def _batches(self) -> Iterator[Batch]:
        dataset = self._held.dataset
        assert dataset is not None
        for first in range(0, self._held.sequences, self._rows):
            last = min(first + self._rows, self._held.sequences) - 1
            yield collate(dataset.get_samples(first, last))

    def _sample(self, step: int) -> list[dict[str, str]]:
        tokenizer, prompts = self._held.tokenizer, list(self._held.prompts)
        assert tokenizer is not None
        tokens = self._options.sample_tokens
        hand_on(Continue(step, prompts, tokens), self._trainer.topology)
        added = ranks.continued(self._trainer, prompts, tokens)
        texts = []
        for prompt, ids, more in zip(self._options.sample_prompt, prompts, added, strict=True):
            end = tokenizer.eos_token_id
            more = more[: more.index(end)] if end in more else more
            whole = str(tokenizer.decode([*ids, *more], skip_special_tokens=True))
            texts.append({"prompt": prompt, "text": whole})
        return texts
