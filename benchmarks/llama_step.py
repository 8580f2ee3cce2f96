"""A whole train step of a Llama with AdamW and with DisTrO, taking turns on one device.

Both have the same model with the same random weights in bfloat16, the same batch, and clip to a
norm of 1. DisTrO works as in `train`: look ahead, forward and backward, compress and pack, then
check, unpack and apply the message of the step before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.common import percentiles
from psyche_fast.bench.step_cases import DECAY, RATE, WEIGHT_DECAY, release
from psyche_fast.distro import DistroStep
from psyche_fast.distro.message import MessageFormat
from psyche_fast.kernels.plan import Entries

TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
MAX_NORM = 1.0
PEERS = 2
"""Messages that DisTrO applies in a step, all of them its own."""


def llama(settings: dict[str, int], length: int) -> transformers.LlamaConfig:
    """Llama 3.2's architecture with the given sizes."""
    return transformers.LlamaConfig(
        **settings, max_position_embeddings=length, tie_word_embeddings=True, rms_norm_eps=1e-5
    )


class Clock:
    """Marks in time, on a GPU by its own events, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """Now."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second."""
        if self._device.type != "cuda":
            return 1e3 * (end - start)
        end.synchronize()
        return float(start.elapsed_time(end))


class Side:
    """One model with its optimiser."""

    def __init__(self, config: transformers.LlamaConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).train()
        self.clock = Clock(device)
        self.losses: list[Tensor] = []

    def before(self) -> None:
        """What comes before the forward."""

    def update(self) -> None:
        """Clip and take the step."""
        raise NotImplementedError

    def step(self, ids: Tensor) -> list[Any]:
        """A whole step; marks at its begin, before and after the model's part, and at its end."""
        marks = [self.clock.mark()]
        self.before()
        marks.append(self.clock.mark())
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.losses.append(loss.detach())
        marks.append(self.clock.mark())
        self.update()
        self.model.zero_grad(set_to_none=True)
        marks.append(self.clock.mark())
        return marks


class AdamW(Side):
    """Fused AdamW with bfloat16 states, as torch makes them for such parameters."""

    def __init__(
        self, config: transformers.LlamaConfig, device: torch.device, backend: str
    ) -> None:
        del backend
        super().__init__(config, device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )

    def update(self) -> None:
        """Clip the gradients and take the step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM, foreach=True)
        self.optimizer.step()


class DisTrO(Side):
    """DisTrO, k = 8, with float32 delta, and signs that travel as messages."""

    def __init__(
        self, config: transformers.LlamaConfig, device: torch.device, backend: str
    ) -> None:
        super().__init__(config, device)
        self.distro = DistroStep(
            self.model.named_parameters(),
            compression_decay=DECAY,
            compression_chunk=64,
            compression_topk=8,
            weight_decay=WEIGHT_DECAY,
            backend=backend,
        )
        self._format = MessageFormat(self.distro.layout, self.distro.backends, signs=True)
        self._own: list[Entries] | None = None
        self._sent: Tensor | None = None

    def before(self) -> None:
        """Look ahead."""
        self.distro.look_ahead(RATE)

    def update(self) -> None:
        """Compress, with the clip factor on the device, and apply the previous messages."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True).float()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        before = self._sent
        self._own = self.distro.compress(self._own, RATE, grad_scale=scale)
        self._sent = self._format.pack(self._own)
        messages = (self._sent if before is None else before).expand(PEERS, -1).contiguous()
        entries, faults = self._format.unpack(messages)
        if entries is None:
            raise RuntimeError(f"the own message is refused: {faults}")
        self.distro.update(entries, RATE)


SIDES: dict[str, Callable[..., Side]] = {"AdamW": AdamW, "DisTrO": DisTrO}


def compare(
    settings: dict[str, int],
    device: torch.device,
    backend: str,
    *,
    rows: int,
    length: int,
    out_of_time: Callable[[], bool],
    rounds: tuple[int, int] = (5, 30),
) -> Iterator[dict[str, Any]]:
    """Run both, first each for its memory, then in turns for time.

    Args:
        settings: sizes of the model.
        device: where.
        backend: of the kernels.
        rows: sequences per step.
        length: tokens per sequence.
        out_of_time: whether to stop after this round.
        rounds: at least and at most so many steps of each are timed.

    Yields:
        The figures so far, whenever there are more. The last has "check".
    """
    config = llama(settings, length)
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (rows, length), device=device, generator=generator)
    report: dict[str, Any] = {"rows": rows, "length": length, "peak_gb": {}, "dtype": "bfloat16"}
    sides: dict[str, Side] = {}
    for name, build in SIDES.items():
        release(device)
        cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if cuda else 0
        sides[name] = build(config, device, backend)
        for _ in range(3):
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            sides[name].step(ids)
        if cuda:
            torch.cuda.synchronize(device)
            report["peak_gb"][name] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
        yield report
    report["parameters"] = sum(p.numel() for p in sides["AdamW"].model.parameters())
    whole: dict[str, list[float]] = {name: [] for name in sides}
    update: dict[str, list[float]] = {name: [] for name in sides}
    while len(whole["AdamW"]) < rounds[0] or (
        len(whole["AdamW"]) < rounds[1] and not out_of_time()
    ):
        order = list(sides) if len(whole["AdamW"]) % 2 else list(reversed(sides))
        for name in order:
            start, looked, ran, end = sides[name].step(ids)
            clock = sides[name].clock
            whole[name].append(clock.milliseconds(start, end))
            update[name].append(clock.milliseconds(start, looked) + clock.milliseconds(ran, end))
    report["step_ms"] = {name: percentiles(times) for name, times in whole.items()}
    report["optimizer_ms"] = {name: percentiles(times) for name, times in update.items()}
    # Neighbouring steps saw the same machine: the median of their ratios is the steadier figure.
    pairs = zip(whole["DisTrO"], whole["AdamW"], strict=True)
    report["ratio"] = percentiles([a / b for a, b in pairs])
    losses = {name: torch.stack(side.losses).tolist() for name, side in sides.items()}
    report["losses"] = {name: [values[0], values[-1]] for name, values in losses.items()}
    first = losses["AdamW"][0], losses["DisTrO"][0]
    finite = all(abs(v) < 1e4 for values in losses.values() for v in values)
    report["check"] = {
        "ok": finite and abs(first[0] - first[1]) <= 1e-3 * abs(first[0]),
        "against": "each other's loss before the first step; all losses finite",
    }
    yield report
