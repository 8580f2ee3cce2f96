"""Draws the pictures of docs/how-it-works.md: `python -m tools.pictures [FOLDER]`.

What they show is measured: two replicas of a small Llama learn from Python's own standard library
with the package's DisTrO, and momenta and messages are those of this run.
"""

from __future__ import annotations

import sys
import sysconfig
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench_bytes import measure
from psyche_fast.config import RunConfig
from psyche_fast.distro.chunks import dct_basis
from psyche_fast.links import Link
from psyche_fast.methods import Replica, get
from psyche_fast.rank.costs import costs_of
from psyche_fast.rank.method import method_of

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
NAMES = ("chunk", "energy", "steps", "bytes")
CHUNK, K, STEPS, LENGTH, ROWS = 64, 8, 60, 128, 4
WATCHED = "model.layers.1.mlp.up_proj.weight"
LINK = Link(1e8, 1e8, 0.05)
OURS, OTHERS, LATE = "#2a6fb0", "#9a9a9a", "#d98f2b"
plt.rcParams |= {
    "svg.hashsalt": "psyche_fast", "svg.fonttype": "none", "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
}  # fmt: skip


@dataclass
class Seen:
    """What two replicas were like after their last step.

    Attributes:
        momenta: of each replica, by parameter, `[chunks, h, w]` as kept, what is sent included.
        sent: of each replica, the watched parameter's coefficients in its last message, dense.
        losses: of each replica, by step.
    """

    momenta: list[dict[str, Tensor]]
    sent: list[Tensor]
    losses: list[list[float]]


def train(steps: int = STEPS, rate: float = 1e-3) -> Seen:
    """Two replicas in one process, on rows of bytes of the standard library."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    models = [LlamaForCausalLM(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files[:60])
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = rows[: len(rows) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    method = get("distro", k=K)
    named = [dict(model.named_parameters()) for model in models]
    replicas = [
        Replica(method, parameters, replica=r, replicas=2) for r, parameters in enumerate(named)
    ]
    pending: deque[Tensor] = deque()
    losses: list[list[float]] = [[], []]
    for step in range(steps):
        messages = []
        for r, (model, replica) in enumerate(zip(models, replicas, strict=True)):
            replica.before_forward(step)
            at = (2 * step + r) * ROWS % (len(rows) - ROWS)
            batch = rows[at : at + ROWS]
            model.zero_grad()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            losses[r].append(loss.item())
            replica.local(rate)
            sent = replica.send()
            assert sent is not None
            messages.append(sent)
        pending.append(torch.stack(messages))
        while replicas[0].due():
            received = pending.popleft()
            faults = [replica.receive(received) for replica in replicas]
            assert faults == [{}, {}], faults
    # Gradients are taken ahead of the parameters that are shared: those are put back to compare.
    for replica in replicas:
        replica.put_shared()
    first, second = (model.get_parameter(WATCHED).detach() for model in models)
    assert torch.equal(first, second), "the replicas have parted"
    states = [replica.fragments[0].state() for replica in replicas]
    last = []
    for state in states:
        indices, values = (state[kind][WATCHED] for kind in ("indices", "values"))
        dense = torch.zeros(len(indices), CHUNK * CHUNK, dtype=torch.float64)
        dense.scatter_(1, indices.long(), values.double())
        last.append(dense.view(-1, CHUNK, CHUNK))
    return Seen([state["kept"] for state in states], last, losses)


def _transformed(chunks: Tensor) -> Tensor:
    basis = dct_basis(CHUNK, torch.float64, torch.device("cpu"))
    return basis.T @ chunks.double() @ basis


def chunk(seen: Seen, path: Path) -> None:
    """From a chunk of momentum to the message, and what becomes of it."""
    basis = dct_basis(CHUNK, torch.float64, torch.device("cpu"))
    momentum = seen.momenta[0][WATCHED].view(-1, CHUNK, CHUNK).double()
    # The chunk of which a message says most shows best what it says.
    said = seen.sent[0].square().sum((1, 2)) / momentum.square().sum((1, 2))
    at = int(said.argmax())
    kept = [sent[at] for sent in seen.sent]
    heard = basis @ kept[0] @ basis.T
    mean = basis @ ((kept[0].sign() + kept[1].sign()) / 2) @ basis.T
    magnitudes = _transformed(momentum[at]).abs().add(1e-9).log10()
    _, axes = plt.subplots(1, 5, figsize=(11, 2.7), layout="constrained")
    panels: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("momentum of a chunk,\n64 x 64", momentum[at], {"cmap": "RdBu"}),
        ("its DCT\n(magnitude, log scale)", magnitudes, {"cmap": "Greys"}),
        (f"what is sent: {K} places\nand a sign for each", kept[0].sign(), {"cmap": "RdBu"}),
        (f"what these {K} coefficients\nsay of the momentum", heard, {"cmap": "RdBu"}),
        ("the step: sign of what\nboth replicas' results say", mean.sign(), {"cmap": "RdBu"}),
    ]
    for ax, (title, values, options) in zip(axes, panels, strict=True):
        if options["cmap"] == "RdBu":
            top = float(values.abs().max())
            options |= {"vmin": -top, "vmax": top}
        else:
            top = float(values.max())
            options |= {"vmin": top - 2.5, "vmax": top}
        ax.imshow(values.numpy(), interpolation="nearest", **options)
        ax.set_title(title, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(True)
    for r, marker in enumerate("ox"):
        y, x = kept[r].nonzero(as_tuple=True)
        color = OURS if r == 0 else LATE
        size, edge = (28, 1.0)
        face = {"facecolors": "none", "edgecolors": color} if marker == "o" else {"color": color}
        axes[2].scatter(x, y, s=size, marker=marker, linewidths=edge, **face)
    axes[2].set_xlabel("o this replica's, x the other's", fontsize=8)
    _save(path)


def energy(seen: Seen, path: Path) -> None:
    """Share of the momentum's energy in the k largest, with the transform and without."""
    ks = [2**n for n in range(13)]
    _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    matrices = {
        name: kept.view(-1, CHUNK, CHUNK)
        for name, kept in seen.momenta[0].items()
        if kept.shape[-2:] == (CHUNK, CHUNK)
    }
    for color, label, transform in (
        (OURS, "of the DCT's coefficients", _transformed),
        (OTHERS, "of the entries as they stand", None),
    ):  # fmt: skip
        shares = []
        for kept in matrices.values():
            values = kept.double() if transform is None else transform(kept)
            ranked = values.flatten(1).square().sort(descending=True).values.cumsum(1)
            shares.append(torch.stack([ranked[:, k - 1].sum() for k in ks]) / ranked[:, -1].sum())
        every = torch.stack(shares)
        ax.fill_between(
            ks, every.min(0).values, every.max(0).values, color=color, alpha=0.2, linewidth=0
        )
        ax.plot(ks, every.mean(0), color=color, label=label)
    ax.axvline(K, color="black", linewidth=0.8, linestyle="--")
    ax.text(K, 1.0, f" k = {K}", va="top")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [str(k) for k in ks], fontsize=8)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("k largest of a chunk's 4096")
    ax.set_ylabel("share of the momentum's energy")
    ax.legend(frameon=False, loc="center left")
    _save(path)


def steps(path: Path, step_seconds: float = 2.0) -> None:
    """When is what under way: DisTrO beside the next step, a dense gradient in its own."""
    shape = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(shape).named_parameters())
    found = {}
    for label, options in (
        ("dense", {"method": "dense"}), ("DisTrO", {"distro": True, "distro_quantization": True}),
    ):  # fmt: skip
        run = RunConfig.of(replicas=2, param_dtype="float32", **options)
        costs = costs_of(run, parameters, method_of(run))
        found[label] = (costs.messages[0], costs.exchange_seconds(LINK), costs.delay)
    _, ax = plt.subplots(figsize=(9, 2.6), layout="constrained")
    end = 4 * step_seconds + found["dense"][1]
    for row, (label, (sent, seconds, delay)) in enumerate(found.items()):
        start, number = 0.0, 1
        while start < end:
            ax.barh(2 * row, step_seconds, 0.7, start, color=OURS)
            ax.text(
                start + step_seconds / 2,
                2 * row,
                str(number),
                color="white",
                ha="center",
                va="center",
            )
            ax.barh(2 * row + 0.75, seconds, 0.6, start + step_seconds, color=LATE)
            start += step_seconds + (0.0 if delay else seconds)
            number += 1
        ax.text(
            -0.15, 2 * row + 0.4,
            f"{label}\n{sent / 1e6:,.1f} MB a step\n{seconds:.2f} s on the link",
            ha="right", va="center",
        )  # fmt: skip
    ax.set_xlim(0, end)
    ax.set_ylim(3.2, -0.5)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    millions = sum(p.numel() for p in parameters.values()) / 1e6
    ax.set_xlabel(
        f"seconds: two replicas, {millions:,.0f} M parameters, "
        f"a step of {step_seconds:g} s, 100 Mbit/s and 50 ms"
    )
    ax.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c) for c in (OURS, LATE)],
        ["forward and backward of step", "its exchange"], frameon=False, ncols=2,
        loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0,
    )  # fmt: skip
    _save(path)


def sizes(path: Path) -> None:
    """Bytes per 4096 parameters and inner step, as they are on the wire."""
    rows = [row for row in measure() if not row["method"].startswith("train")]
    rows.sort(key=lambda row: row["per_chunk"])
    _, ax = plt.subplots(figsize=(7, 0.27 * len(rows) + 0.9), layout="constrained")
    _bars(ax, [row["method"] for row in rows], [row["per_chunk"] for row in rows])
    ax.set_xscale("log")
    ax.set_xlabel("bytes per 4096 parameters and inner step, headers and vectors included")
    _save(path)


def _bars(ax: Axes, labels: list[str], values: list[float]) -> None:
    colors = [OTHERS if label.startswith("dense") else OURS for label in labels]
    ax.barh(labels, values, color=colors, height=0.7)
    for y, value in enumerate(values):
        ax.text(
            value * 1.06,
            y,
            f"{value:,.3g}" if value < 1000 else f"{value:,.0f}",
            va="center",
            fontsize=8,
        )
    ax.set_xlim(1, max(values) * 4)
    ax.tick_params(axis="y", labelsize=8)
    ax.invert_yaxis()


def _save(path: Path) -> None:
    plt.savefig(path, metadata={"Date": None})
    plt.close()


def draw(folder: Path = FOLDER, seen: Seen | None = None) -> None:
    """Writes `NAMES`, each an SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = seen or train()
    chunk(seen, folder / "chunk.svg")
    energy(seen, folder / "energy.svg")
    steps(folder / "steps.svg")
    sizes(folder / "bytes.svg")
    first, last = (sum(losses[at] for losses in seen.losses) / 2 for at in (0, -1))
    print(f"{STEPS} steps, loss {first:.2f} to {last:.2f}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
