"""Training and loading of tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Radford et al. 2019, GPT-2).

    All 256 bytes are tokens of their own and nothing is normalised, so every text comes back
    exactly from its tokens. `END_OF_TEXT` has id 0 and is the beginning, end and padding token.

    Args:
        texts: text to learn from, in pieces of any size.
        vocab_size: entries to learn, with the bytes and the end-of-text token among them. Little
            text gives fewer; `len(tokenizer)` tells.

    Raises:
        ValueError: if `vocab_size` has no room for the bytes and the end-of-text token.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(
            f"the vocabulary size (--vocab-size) must be at least {_BYTES + 1} "
            f"({_BYTES} bytes and {END_OF_TEXT}), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path_or_hub_id: str | Path) -> transformers.PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder, a tokenizer folder or a Hugging Face hub id.

    Raises:
        ValueError: if there is none, or it has no fast (`tokenizers`) form or no end-of-text token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path_or_hub_id), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from {path_or_hub_id}: {reason}") from error
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer of {path_or_hub_id} ({type(tokenizer).__name__}) has no fast form"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path_or_hub_id} has no end-of-text (eos) token")
    return tokenizer


def bytes_of_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> np.ndarray | None:
    """How many bytes of text each token stands for, `int64 [highest id + 1]`.

    Special tokens stand for none. Byte-level and SentencePiece tokenizers say it of each token by
    itself; of others it is not known, and None is returned.
    """
    backend = tokenizer.backend_tokenizer
    kinds = re.findall(r'"type": ?"(\w+)"', json.dumps(json.loads(backend.to_str())["decoder"]))
    of_bytes = "ByteLevel" in kinds
    if not of_bytes and not {"Metaspace", "Replace"} & set(kinds):
        return None
    vocabulary = tokenizer.get_vocab()
    counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    added = backend.get_added_tokens_decoder()
    for token, number in vocabulary.items():
        if number in added:
            counts[number] = 0 if added[number].special else len(token.encode())
        elif of_bytes:  # each character stands for one
            counts[number] = len(token)
        elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            counts[number] = 1
        else:
            counts[number] = len(token.replace("\u2581", " ").encode())
    return counts
