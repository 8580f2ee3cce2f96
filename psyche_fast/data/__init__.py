"""Training data: token files, Parquet, their seeded order, background batches, tokenising."""

from psyche_fast.batch import Batch
from psyche_fast.data.card import check_card
from psyche_fast.data.datasets import folders_of, open_dataset
from psyche_fast.data.dummy import DummyDataset
from psyche_fast.data.local import LocalDataset
from psyche_fast.data.mixture import MixtureDataset
from psyche_fast.data.order import shuffled_order
from psyche_fast.data.parquet import ParquetDataset
from psyche_fast.data.prefetch import BatchPrefetcher
from psyche_fast.data.remote import BlockCache
from psyche_fast.data.samples import Dataset, Sample, collate
from psyche_fast.data.texts import find_files, iter_texts
from psyche_fast.data.tokenize import TokenizeSummary, tokenize_files
from psyche_fast.data.tokenizer import bytes_of_tokens, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "BatchPrefetcher",
    "BlockCache",
    "Dataset",
    "DummyDataset",
    "LocalDataset",
    "MixtureDataset",
    "ParquetDataset",
    "Sample",
    "TokenizeSummary",
    "bytes_of_tokens",
    "check_card",
    "collate",
    "find_files",
    "folders_of",
    "iter_texts",
    "load_tokenizer",
    "open_dataset",
    "shuffled_order",
    "tokenize_files",
    "train_tokenizer",
]
