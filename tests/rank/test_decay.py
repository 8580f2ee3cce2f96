"""`--decay matrices`: norms, biases and embeddings are left out, in every optimiser."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psyche_fast import config
from psyche_fast.distro import Distro
from psyche_fast.models import load_model
from psyche_fast.models.source import resolve_model
from psyche_fast.rank.optimizers import make_optimizer
from psyche_fast.rank.trainer import trainable
from tests.tiny import save_llama

RATE = 0.5
DECAY = 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("distro", [False, True])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_only_matrices_decay(tmp_path: Path, tied: bool, distro: bool, master: torch.dtype) -> None:
    """Without gradients weight decay is all that a step does."""
    folder = save_llama(tmp_path / "model", tie_word_embeddings=tied, attention_bias=True)
    model = load_model(
        resolve_model(str(folder)), device=torch.device("cpu"), param_dtype=torch.bfloat16,
        master_dtype=master,
    )  # fmt: skip
    parameters = trainable(model)
    with torch.no_grad():
        for tensor in (*parameters.values(), *model.masters.values()):
            tensor.fill_(1.0)
    options = config.Optimizer(
        distro=distro, weight_decay=DECAY, decay="matrices", compression_chunk=8
    )
    optimizer = make_optimizer(options, parameters, None, model.masters, model.all_but_matrices())
    optimizer.look_ahead(0.0)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.after_backward(RATE, RATE, torch.ones(()))
    optimizer.step(RATE)
    optimizer.plain()
    for name, parameter in parameters.items():
        left_out = "norm" in name or "bias" in name or "embed" in name
        expected = torch.tensor(1.0 if left_out else 1 - RATE * DECAY).bfloat16()
        assert (parameter == expected).all(), name


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_decay_in_passing_and_alone_are_the_same(kind: type) -> None:
    torch.manual_seed(0)
    runs = []
    for apply in (True, False):
        parameters = {n: torch.nn.Parameter(torch.ones(8, 8)) for n in ("first", "second", "third")}
        distro = Distro(
            parameters, compression_decay=0.9, compression_topk=3, compression_chunk=8,
            weight_decay=DECAY, undecayed={"second"},
        )  # fmt: skip
        distro.error_correction(kind(0.0))
        own = distro.generate(None, kind(0.0), kind(RATE))
        if apply:
            distro.apply([own], kind(0.0))
        distro.error_correction(kind(0.0))
        distro.undo_error_correction()
        runs.append(parameters)
    for name in runs[0]:
        expected = torch.tensor(1.0 if name == "second" else 1 - RATE * DECAY)
        for parameters in runs:
            torch.testing.assert_close(parameters[name], expected.expand(8, 8))
