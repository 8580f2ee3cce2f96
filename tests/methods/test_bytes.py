"""How much methods send, counted of real messages."""

from __future__ import annotations

import pytest

from benchmarks.bench_bytes import CASES, measure
from psyche_fast.bench.shapes import llama

SHAPES = llama(vocabulary=2048, width=512, layers=1, key_value=128, hidden=1408, tied=True)
AT_MOST = {"train --distro k=2": 3.5, "distro k=2": 3.5, "sparseloco": 2.9}
"""Per 4096 parameters and inner step."""


@pytest.mark.parametrize("label", AT_MOST)
def test_a_method_sends_as_little_as_promised(label: str) -> None:
    cases = [case for case in CASES if case.label == label]
    (row,) = measure(cases, SHAPES)
    assert 0.9 * AT_MOST[label] < row["per_chunk"] <= AT_MOST[label]
    assert row["per_chunk"] < row["reference"]
