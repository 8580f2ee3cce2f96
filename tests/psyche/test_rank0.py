"""A stand-in for Psyche's core drives `python -m psyche.sidecar`, against plain Transformers.

The losses are those of one process with Transformers' own model under the same arithmetic.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.groups import fork_ranks, in_process
from tests.psyche.rank0 import Core, RustTrainer, signs, traced
from tests.tiny import random_tokens, save_llama

pytestmark = pytest.mark.processes
ON_PATH = str(Path(__file__).parents[2] / "psyche_fast/psyche/on_path")
LR = 0.01


def adamw(clip: float | None = 0.5) -> dict[str, Any]:
    return {
        "AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1e-8, "clip_grad_norm": clip}
    }


def distro(clip: float | None = None, signs: bool = False) -> dict[str, Any]:
    return {
        "Distro": {
            "clip_grad_norm": clip, "weight_decay": 0.1, "compression_decay": 0.9,
            "compression_topk": 4, "compression_chunk": 16, "quantize_1bit": signs,
        }
    }  # fmt: skip


class Plain:
    """Transformers' model behind the face that the core's trainer wants: all ranks in one."""

    def __init__(self, folder: Path, dp: int) -> None:
        self.module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.dp = dp

    def forward(
        self, ids: Tensor, labels: Tensor | None, positions: Tensor | None, lengths: Any,
        keep: int | None, scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = len(ids) // self.dp
        found = []
        for rank in range(self.dp):
            cut = slice(rank * rows, (rank + 1) * rows)
            at = None if positions is None else positions[cut]
            output = self.module(
                ids[cut], labels=None if labels is None else labels[cut], position_ids=at,
                use_cache=False,
            )  # fmt: skip
            found.append(output)
        losses = [torch.zeros(()) if o.loss is None else o.loss.nan_to_num() for o in found]
        return found[0].logits[:, -(keep or 0) :], torch.stack(losses).mean() / (scale or 1.0)

    def named_parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def train(self) -> None:
        self.module.train()


def start(folder: Path, logs: Path, dp: int, tp: int) -> Core:
    fork_ranks({"psyche.sidecar": "psyche_fast.sidecar:main_for_psyche"})
    return Core(dp, tp, logs, ON_PATH)


def load(core: Core, folder: Path, source: str, **options: Any) -> None:
    if source == "files":
        core.load_files(sorted(folder.iterdir()), **options)
        return
    tensors = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).state_dict()
    core.load_tensors((folder / "config.json").read_text(), tensors, **options)


Found = dict[str, Any]


def _adamw(folder: Path, logs: Path, dp: int, tp: int, source: str, clip: float | None) -> Found:
    core = start(folder, logs, dp, tp)
    load(core, folder, source)
    plain = Plain(folder, dp)
    expected = RustTrainer(plain, adamw(clip), 2 * dp, LR, can_clip=True)
    core.hyperparameters(adamw(clip), micro_batch=2, lr=LR)
    losses, wanted = [], []
    for step in range(1, 5):
        for again in range(
            1 if step == 1 else 2
        ):  # the last of several counts: gradients start anew
            ids = random_tokens(4 * dp, 12, seed=step % 2 + 2 * again)
            batch = [ids, None, None, None]
            losses.append(core.train(step, *batch, warmup=(0, 2))[0])
            wanted.append(expected.train(step, batch, [], False, (0, 2), None)[0])
        if step == 3:
            continue  # a round without `optimize`
        logits, loss = core.forward(ids, ids, scale=2.0)
        assert type(logits) is type(loss) is Tensor
        rows = slice(0, len(ids) // dp)
        true_loss, true = (t.detach() for t in plain.module(ids[rows], labels=ids[rows])[:2])
        torch.testing.assert_close(logits, true, rtol=1e-3, atol=1e-3)
        assert float(loss) == pytest.approx(float(true_loss) / 2, abs=1e-3)
        kept, none = core.forward(ids, keep=3)
        assert none is None
        torch.testing.assert_close(kept, true[:, -3:], rtol=1e-3, atol=1e-3)
        core.optimize(step, warmup=(0, 2))
        expected.optimize(step, [], (0, 2))
    # rows that do not divide are padded: with labels the padding counts for nothing
    ids, labels = random_tokens(4 * dp - 1, 12, seed=9), random_tokens(4 * dp - 1, 12, seed=9)
    labels[:, :3] = -100
    losses.append(core.train(5, ids, labels)[0])
    padded = [*core._pad(ids, labels, None, None)]
    loss = expected.train(5, padded, [], False, None, None)[0]
    wanted.append(loss * len(padded[0]) / len(ids))
    core.optimize(5)
    expected.optimize(5, [], None)
    # documents in a row
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]]).repeat(2 * dp, 1)
    ids = random_tokens(4 * dp, 12, seed=8)
    lengths = [[5, 7], [12]] * 2 * dp
    losses.append(core.train(6, ids, ids, positions, lengths)[0])
    wanted.append(expected.train(6, [ids, ids, positions, None], [], False, None, None)[0])
    core.optimize(6)
    expected.optimize(6, [], None)
    losses.append(core.train(7, ids, None, None, lengths)[0])
    wanted.append(expected.train(7, [ids, ids, positions, None], [], False, None, None)[0])
    return {**_end(core, expected), "losses": losses, "expected": wanted}


def _distro(folder: Path, logs: Path, dp: int, tp: int, clip: float | None, bits: bool) -> Found:
    core = start(folder, logs, dp, tp)
    load(core, folder, "files")
    plain = Plain(folder, dp)
    expected = RustTrainer(plain, distro(clip), 2 * dp, LR, can_clip=True)
    core.hyperparameters(distro(clip), micro_batch=2, lr=LR)
    losses, wanted = [], []
    rounds: list[list[list[Any]]] = []
    mirror: list[list[list[Any]]] = []
    for step in range(1, 6):
        own, own_mirror = [], []
        if step > 2:  # at the start of a round, the peers' results of the round before the last
            peers, peers_mirror = rounds[step - 3], mirror[step - 3]
            if bits:
                peers, peers_mirror = [signs(p) for p in peers], [signs(p) for p in peers_mirror]
            core.optimize(step, peers)
            expected.optimize(step, peers_mirror, None)
        batches = 3 if step == 2 else 1
        for number in range(batches):
            ids = random_tokens(4 * dp, 12, seed=step % 2 + 5 * number)
            previous, previous_mirror = (rounds[-1], mirror[-1]) if rounds else ([], [])
            zero = step == 1
            loss, result = core.train(step, ids, results=previous, zero_optim=zero)
            losses.append(loss)
            loss, true = expected.train(
                step, [ids, None, None, None], previous_mirror, zero, None, None
            )
            wanted.append(loss)
            own.append(result)
            own_mirror.append(true)
        rounds.append(own)
        mirror.append(own_mirror)
    core.optimize(6)  # without results nothing changes
    expected.optimize(6, [], None)
    return {**_end(core, expected), "losses": losses, "expected": wanted}


def _end(core: Core, expected: RustTrainer) -> Found:
    whole = core.extract()
    core.truncate_bf16()
    rounded = core.extract()
    assert all(torch.equal(rounded[n], whole[n].bfloat16().float()) for n in whole)
    apart = [float((whole[n] - p).abs().mean()) for n, p in expected.extract().items()]
    assert set(whole) == set(expected.names)
    return {"codes": core.exit(), "apart": max(apart)}


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("dp", "tp"), LAYOUTS)
def test_adamw(tmp_path: Path, dp: int, tp: int) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    source = "files" if tp == 1 else "config_and_tensors"
    clip = 0.5 if tp == 1 else None
    found = in_process(_adamw, folder, tmp_path, dp, tp, source, clip)
    assert found["codes"] == [0] * (dp * tp - 1)
    assert found["losses"] == pytest.approx(found["expected"], abs=1e-3)
    assert found["losses"][-1] < found["losses"][-2] - 0.05, "AdamW's steps reach the model"
    assert found["apart"] < 1e-3


@pytest.mark.parametrize(
    ("dp", "tp", "clip", "bits"),
    [(1, 1, 0.5, True), (2, 1, 0.5, False), (1, 2, 0.0, True), (2, 2, None, True)],
)
def test_distro(tmp_path: Path, dp: int, tp: int, clip: float | None, bits: bool) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    found = in_process(_distro, folder, tmp_path, dp, tp, clip, bits)
    assert found["codes"] == [0] * (dp * tp - 1)
    assert found["losses"][:4] == pytest.approx(found["expected"][:4], abs=1e-3)
    # results are applied now: where signs cancel, rounding decides the direction of a step
    assert found["losses"] == pytest.approx(found["expected"], abs=5e-2)
    assert found["losses"][-1] < found["losses"][0] - 0.1, "the results reach the model"
    assert found["apart"] < 2 * LR


Moved = tuple[str, int, torch.dtype]
NAMES = {
    "allgather_base": "gather", "all_gather_into_tensor": "gather", "allreduce": "sum",
    "all_reduce": "sum", "reduce_scatter_base": "reduce", "scatter": "scatter",
    "broadcast": "broadcast", "barrier": "barrier",
}  # fmt: skip


def _traces(folder: Path, logs: Path, dp: int, tp: int, clip: float | None) -> dict[str, Any]:
    core = start(folder, logs, dp, tp)
    load(core, folder, "files", dtype=torch.bfloat16)
    core.hyperparameters(distro(clip), micro_batch=4 // dp)
    own: list[Any] = []
    found: dict[str, list[Moved]] = {}
    for step in (1, 2):
        with traced() as found[f"train {step}"]:
            own = [core.train(step, random_tokens(4, 8), results=own)[1]]
        with traced() as found[f"optimize {step}"]:
            core.optimize(step, own if step > 1 else [])
        with traced() as found[f"forward {step}"]:
            core.forward(random_tokens(4, 8))
    with traced() as found["extract"]:
        core.extract()
    core.hyperparameters(adamw(clip), micro_batch=4 // dp)
    with traced() as found["adamw: train"]:
        core.train(3, random_tokens(4, 8))
    with traced() as found["adamw: optimize"]:
        core.optimize(3)
    split = [n for n, v in core.model.named_parameters().items() if hasattr(v, "placements")]
    core.exit()
    kept = {
        operation: [(NAMES[n], size, dtype) for n, size, dtype in log if n in NAMES]
        for operation, log in found.items()
    }
    return {"split": len(split), **kept}


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="FSDP2 gathers at other times in other versions"
)
def test_collectives_of_two_shards(tmp_path: Path) -> None:
    """The figures are those of a trace of Psyche's own Python with such a model."""
    folder = save_llama(
        tmp_path / "model", vocab_size=256, hidden_size=64, intermediate_size=128, dtype="float32"
    )
    found = in_process(_traces, folder, tmp_path, 2, 1, 0.5)
    assert found["split"] == 21
    root, layer, low = 32832, 36992, torch.bfloat16
    begin: list[Moved] = [("barrier", 1, torch.uint8)]
    batch: list[Moved] = [("broadcast", 32, torch.int64)]
    forward: list[Moved] = [("gather", n, low) for n in (root, layer, layer)]
    backward: list[Moved] = [
        *[("gather", layer, low)] * 2,
        *(("reduce", n, torch.float32) for n in (layer, layer, root)),
    ]
    clip: list[Moved] = [("sum", 21, torch.float32)]
    loss: list[Moved] = [("sum", 1, torch.float32)]
    for step in (1, 2):
        assert found[f"forward {step}"] == [*begin, *batch, *forward]
        log = found[f"train {step}"]
        results, rest = log[1 : 43 if step > 1 else 1], log[43 if step > 1 else 1 :]
        assert [n for n, *_ in results] == ["broadcast"] * len(results)
        length = len(batch + forward + backward + clip)
        assert rest[:length] == [*batch, *forward, *backward, *clip]
        each = ["scatter", "gather"] if step > 1 else ["gather"]
        assert [n for n, *_ in rest[length:-1]] == each * 21
        assert {t for *_, t in rest[length:-1]} == {torch.float32}, "the parameters' own type"
        assert rest[-1:] == loss
        applied = ["broadcast"] * 42 + ["scatter"] * 21 if step > 1 else []
        assert [n for n, *_ in found[f"optimize {step}"]] == ["barrier", *applied]
    assert [n for n, *_ in found["extract"]] == ["barrier"] + ["gather"] * 21
    assert found["adamw: train"] == [*begin, *batch, *forward, *backward, *loss]
    assert found["adamw: optimize"] == [*begin, *clip]


@pytest.mark.parametrize("dp", [1, 2])
def test_collectives_of_split_layers(tmp_path: Path, dp: int) -> None:
    """By parameter after backward, and none besides; what a forward needs is the tensor plan's."""
    folder = save_llama(tmp_path / "model", dtype="float32", num_hidden_layers=1)
    found = in_process(_traces, folder, tmp_path, dp, 2, None)
    # norms stand alone on each rank where nothing shards them
    assert found["split"] == (9 if dp == 1 else 12)
    cuts = 9 + (12 if dp == 2 else 0)  # each is gathered over each dimension that cuts it
    assert Counter(n for n, *_ in found["extract"]) == {"barrier": 1, "gather": cuts}
    for step in (1, 2):
        names = Counter(n for n, *_ in found[f"optimize {step}"])
        # the gradient of the embedding's rows stands whole on each rank, by our tensor plan
        whole = 1 if dp == 1 else 0
        more = {"broadcast": 24 + whole, "scatter": cuts - whole} if step > 1 else {}
        assert names == {"barrier": 1, **more}
        log = [n for n, *_ in found[f"train {step}"]]
        after = log[len(log) - 1 - cuts * (2 if step > 1 else 1) : -1]
        more = {"scatter": cuts} if step > 1 else {}
        assert Counter(after) == {"gather": cuts, **more}
        assert log[-1] == "sum"
    assert found["forward 1"] == found["forward 2"]
    assert [n for n, *_ in found["adamw: optimize"]] == ["barrier"]
