"""Every recipe in `examples/` runs as its first lines say, learns, and its replicas agree."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.groups import run_processes
from tests.processes import free_port

EXAMPLES = Path(__file__).parents[1] / "examples"
# How many processes each is run in, what it needs beside the package, and what makes it tell.
RECIPES = {
    "plain_loop": (2, None),
    "ddp": (2, None),
    "fsdp2_replicas": (4, None),
    "transformers_trainer": (2, "accelerate"),
    "with_accelerate": (2, "accelerate"),
    "with_lightning": (2, "lightning"),
    "with_torchtitan": (2, "torchtitan"),
}


def test_all_recipes_are_here_and_short():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RECIPES)
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") < 80, path


def _run(rank, path, world, port, folder):
    """As torchrun starts it; the losses and the parameters."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TMPDIR": folder,
    }  # fmt: skip
    os.chdir(folder)
    sys.argv = [path]
    losses, model = runpy.run_path(path)["main"]()
    named = model if isinstance(model, dict) else dict(model.named_parameters())
    return losses, {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.processes
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, tmp_path):
    world, needed = RECIPES[name]
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    path = str(EXAMPLES / f"{name}.py")
    ranks = run_processes(_run, (path, world, free_port(), str(tmp_path)), world)
    for losses, parameters in ranks:
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
        for key, tensor in parameters.items():
            assert torch.equal(tensor, ranks[0][1][key]), f"replicas agree on {key}"
