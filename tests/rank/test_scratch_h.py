from __future__ import annotations
from pathlib import Path
import pytest
from safetensors.torch import load_file
from tests.core.test_resume import parameters, same, states, without_later
from tests.core.test_run import losses, train
from tests.tiny import save_llama, save_tokens
import time

@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    save_tokens(folder / "data")
    return folder

BASE = ("--method", "sparseloco", "--every", "3", "--delay", "1", "--mix", "rebase",
        "--chunk", "16", "--topk", "16", "--replicas", "2", "--checkpoint-every", "2")

@pytest.mark.processes
def test_it(place, tmp_path):
    t=time.time()
    for dtype in ("float32", "bfloat16"):
        base = (*BASE, "--param-dtype", dtype)
        alone = train(place, tmp_path / f"alone{dtype}", *base, ranks=2)
        print(dtype, losses(alone), time.time()-t)
        for dp, tp in ((2,1),(1,2),(2,2)):
            n = 2*dp*tp
            extra = ("--data-parallelism", str(dp), "--tensor-parallelism", str(tp))
            out = tmp_path / f"x{dp}{tp}{dtype}"
            sharded = train(place, out, *base, *extra, ranks=n)
            print(dp, tp, losses(sharded), [l["bytes_sent"] for l in sharded], [l["bytes_sent"] for l in alone], time.time()-t)
            assert losses(sharded) == pytest.approx(losses(alone), rel=1e-3 if dtype=="float32" else 1e-2)
            resumed = without_later(out, tmp_path / f"r{dp}{tp}{dtype}", 2)
            train(place, resumed, *base, *extra, "--resume", "auto", ranks=n)
            assert same(parameters(out, 6), parameters(resumed, 6))
            assert same(states(out, 6), states(resumed, 6))
            print("ok", time.time()-t)
