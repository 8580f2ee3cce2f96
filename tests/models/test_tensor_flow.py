"""What a rank's part of a split layer meets that the plan does not name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psyche_fast.models.tensor_flow import partial_gradients


class Split(nn.Module):
    """Eight columns between `up` and `down`, and something done to them."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(6)
        self.wide = nn.LayerNorm(8)
        self.register_buffer("offset", torch.ones(()))
        self.between = between

    def forward(self, input_ids: Tensor, labels: None = None, position_ids: None = None) -> Tensor:
        x = self.norm(self.embed(input_ids))
        mask = (input_ids > 3)[..., None]
        return x + self.down(self.between(self, self.up(x) * mask, x)) + self.offset


def follow(between: Callable[[Any, Tensor, Tensor], Tensor]) -> set[str]:
    module = Split(between).to("meta")
    return partial_gradients(
        module, 2, columns={"up"}, rows={"down"}, whole=set(), added=set(), parameters={}
    )


@pytest.mark.parametrize(
    ("between", "names"),
    [
        (lambda own, y, x: y.relu(), set()),
        (lambda own, y, x: y * own.scale, {"scale"}),
        (lambda own, y, x: y * (own.offset + own.scale.exp()).sqrt(), {"scale"}),
        # A whole product of each head's two columns.
        (lambda own, y, x: y.unflatten(-1, (-1, 2)) .mul(own.scale).flatten(-2), {"scale"}),
        # Means over tokens are each column's own.
        (lambda own, y, x: y - y.mean(1, keepdim=True), set()),
        # Which experts are chosen has no gradient.
        (lambda own, y, x: y.masked_fill((x[..., :1] > 0), 0.0), set()),
    ],
)  # fmt: skip
def test_whole_parameters_that_meet_columns(between: Any, names: set[str]) -> None:
    assert follow(between) == names


@pytest.mark.parametrize(
    ("between", "says"),
    [
        (lambda own, y, x: y - y.mean(-1, keepdim=True), "mean over what is split"),
        (lambda own, y, x: y.softmax(-1), "_softmax over what is split"),
        (lambda own, y, x: own.wide(y), "wide|layer_norm|normalized_shape"),
        (lambda own, y, x: y * x[..., :1], "mul of a part and what all ranks compute"),
        (lambda own, y, x: y.view(1, 7, 4, 2).flatten(-2), "shape"),
    ],
)
def test_what_cannot_be_computed_from_a_part(between: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"--tensor-parallelism: Split cannot .*({says})"):
        follow(between)


def test_a_parameter_inside_and_outside() -> None:
    class Both(Split):
        def forward(self, input_ids: Tensor, *_: None, **__: None) -> Tensor:
            return super().forward(input_ids) * self.scale

    module = Both(lambda own, y, x: y * own.scale).to("meta")
    with pytest.raises(ValueError, match="scale inside and outside"):
        partial_gradients(
            module, 2, columns={"up"}, rows={"down"}, whole=set(), added=set(), parameters={}
        )
