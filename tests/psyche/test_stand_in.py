"""The model that Psyche's core calls in its own process, and the arithmetic it shares with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from psyche_fast import compat
from psyche_fast.distro import DistroResult
from psyche_fast.models import registry
from psyche_fast.psyche import interface
from psyche_fast.psyche import model as stand_in
from psyche_fast.psyche.decoding import decode
from psyche_fast.psyche.learning_rate import learning_rate
from psyche_fast.psyche.model import make_causal_lm
from psyche_fast.psyche.optimizers import make_optimizer
from psyche_fast.schedules import LearningRateSchedule
from tests.psyche import rank0
from tests.tiny import llama_config, random_tokens, save_llama


def files(folder: Path) -> interface.PretrainedSourceRepoFiles:
    return interface.PretrainedSourceRepoFiles([str(f) for f in sorted(folder.iterdir())])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "model")


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_losses_are_those_of_transformers(folder: Path, attention: str) -> None:
    model = make_causal_lm(
        "HfAuto", files(folder), "cpu", attention, 1, 1, 64, param_dtype=torch.float32
    )
    reference = plain(folder)
    ids, labels = random_tokens(3, 12), random_tokens(3, 12, seed=1)
    labels[0, 4:7] = -100
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)], [*range(11), 0]])
    for at, lengths in ((None, None), (positions, None), (None, [[5, 7], [12], [11, 1]])):
        logits, loss = model.forward(ids, labels, at, lengths, None, 4.0)
        assert loss is not None
        wanted = reference(
            ids, labels=labels, position_ids=positions if at is not None or lengths else None,
            use_cache=False,
        )  # fmt: skip
        torch.testing.assert_close(logits, wanted.logits, rtol=1e-4, atol=1e-5)
        assert float(loss.detach()) == pytest.approx(float(wanted.loss.detach()) / 4, abs=1e-6)
        loss.backward()
        (wanted.loss / 4).backward()
    for name, parameter in reference.named_parameters():
        own = model.named_parameters()[name].grad
        torch.testing.assert_close(own, parameter.grad, rtol=1e-3, atol=1e-6)


def test_rows_without_a_label_count_for_nothing(folder: Path) -> None:
    model = make_causal_lm("HfAuto", files(folder), "cpu", "sdpa", param_dtype=torch.float32)
    _, loss = model.forward(random_tokens(2, 6), torch.full((2, 6), -100))
    assert loss is not None
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(p.grad.any() for p in model.named_parameters().values() if p.grad is not None)


@pytest.mark.parametrize("packed", [False, True])
def test_logits_to_keep_are_chosen_before_the_head(folder: Path, packed: bool) -> None:
    model: Any = make_causal_lm("HfAuto", files(folder), "cpu", "sdpa", param_dtype=torch.float32)
    seen = []
    model.model.module.lm_head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = random_tokens(2, 12)
    positions = torch.tensor([[*range(5), *range(7)]] * 2) if packed else None
    with torch.no_grad():
        whole, _ = model.forward(ids, None, positions)
        seen.clear()
        kept, loss = model.forward(ids, None, positions, None, 3)
    assert loss is None
    torch.testing.assert_close(kept, whole[:, -3:], rtol=1e-5, atol=1e-6)
    assert seen[0].numel() == 2 * 3 * 32


class Own(interface.CausalLM):
    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Own:  # type: ignore[override]
        own = Own()
        own.given = kwargs  # type: ignore[attr-defined]
        return own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return None, None

    def named_parameters(self) -> dict[str, torch.Tensor]:
        return {}

    def get_config(self) -> dict[str, Any]:
        return {}


def test_architectures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = lambda config: transformers.LlamaForCausalLM(llama_config())  # noqa: E731
    monkeypatch.setitem(registry._BUILDERS, "Mine", build)
    for name in ("HfAuto", "HfLlama", "HfDeepseek", "Mine"):
        model = make_causal_lm(name, files(folder), "cpu", "sdpa", 1, 1, 48)
        assert {p.dtype for p in model.named_parameters().values()} == {torch.bfloat16}
        assert len(model.named_parameters()) == 21
        if name != "Mine":
            assert model.get_config()["max_position_embeddings"] == 48
            json.dumps(model.get_config())
    own = make_causal_lm(f"{__name__}:Own", files(folder), "cpu", "eager", 1, 1, 16)
    assert isinstance(own, Own)
    assert own.given["override_max_position_embeddings"] == 16  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "Torchtitan"}, "'Torchtitan': its model code is torchtitan's"),
        ({"architecture": "Unheard"}, "'Unheard'"),
        ({"dp": 2}, "dp 2 x tp 1 is not the number of ranks, 1"),
        ({"fsdp_modules": ["Block"]}, "fsdp_modules"),
        ({"attn_implementation": "flash_attention_2"}, "needs a CUDA device"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    given = {"architecture": "HfAuto", "attn_implementation": "sdpa", **changes}
    with pytest.raises(ValueError, match=said):
        make_causal_lm(source=files(folder), device="cpu", **given)


def test_converted_parameters_are_a_checkpoint(tmp_path: Path) -> None:
    """Of a model whose experts Transformers stacks, by the names that `extract` gives."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    model = make_causal_lm(
        "HfAuto", files(tmp_path / "model"), "cpu", "eager", param_dtype=torch.float32
    )
    extracted = {n: p.detach().clone() for n, p in model.named_parameters().items()}
    found = model.convert(extracted)
    assert any(".experts.3." in name for name in found)
    (tmp_path / "again").mkdir()
    save_file({n: t.contiguous() for n, t in found.items()}, tmp_path / "again/model.safetensors")
    (tmp_path / "again/config.json").write_text((tmp_path / "model/config.json").read_text())
    ids = random_tokens(1, 8) % 64
    with torch.no_grad():
        wanted = plain(tmp_path / "model")(ids).logits
        torch.testing.assert_close(plain(tmp_path / "again")(ids).logits, wanted)
        # peers hand one another the names of `extract`
        text = (tmp_path / "model/config.json").read_text()
        source = interface.PretrainedSourceStateDict(text, extracted)
        peer = make_causal_lm("HfAuto", source, "cpu", "eager", param_dtype=torch.float32)
        torch.testing.assert_close(peer.forward(ids, None)[0], wanted, rtol=1e-4, atol=1e-5)
    assert set(model.convert(None)) >= set(extracted)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (
            {"Cosine": {"base_lr": 0.01, "warmup_init_lr": 0.001, "final_lr": 0.0,
                        "warmup_steps": 10, "total_steps": 110}},
            # beyond its end the core's cosine rises again
            {0: 0.001, 5: 0.0055, 10: 0.01, 60: 0.005, 110: 0.0, 160: 0.005, 210: 0.01},
        ),
        (
            {"Linear": {"base_lr": 0.01, "warmup_init_lr": 0.001, "final_lr": 0.0001,
                        "warmup_steps": 10, "total_steps": 100}},
            {9: 0.0091, 55: 0.00505, 100: 0.0001, 200: 0.0001},
        ),
        (
            {"Constant": {"base_lr": 0.01, "warmup_init_lr": 0.001, "warmup_steps": 10}},
            {0: 0.001, 9: 0.0091, 10: 0.01, 1000: 0.01},
        ),
        (
            {"WarmupStableDecay": {
                "base_lr": 0.01, "warmup_init_lr": 0.001, "warmup_steps": 10, "stable_steps": 60,
                "cosine_decay_steps": 110, "cosine_decay_final_lr": 0.001,
                "linear_decay_steps": 20, "linear_decay_final_lr": 0.0}},
            {10: 0.01, 69: 0.01, 70: 0.01, 125: 0.0055, 180: 0.001, 190: 0.0005, 200: 0.0,
             250: 0.0},
        ),
    ],
)  # fmt: skip
def test_learning_rates_are_psyches(form: dict[str, Any], expected: dict[int, float]) -> None:
    schedule = LearningRateSchedule.from_json(form)
    for step, lr in expected.items():
        assert learning_rate(schedule, step, None) == pytest.approx(lr, abs=1e-9), step
    assert learning_rate(schedule, 10, (8, 12)) == pytest.approx(0.01 / 2)
    assert learning_rate(schedule, 13, (8, 12)) == learning_rate(schedule, 13, None)


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("shape", [(96,), (64, 48), (2, 32, 7), (1, 80, 80)])
def test_results_decode_to_the_peers_mean(shape: tuple[int, ...], bits: bool) -> None:
    """Chunks of up to 256 coefficients and of more; odd sides; a batch of matrices."""
    chunk = 64 if 80 in shape or len(shape) == 1 else 16
    torch.manual_seed(0)
    peers = [rank0.encode(torch.randn(shape), chunk, 4) for _ in range(3)]
    if bits:
        peers = rank0.signs(peers)
    results = [DistroResult(p["idx"], p["val"], p["xshape"], p["totalk"]) for p in peers]
    found = decode(results, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(found, rank0.decode(peers, torch.float32), rtol=1e-4, atol=1e-5)


PSYCHES_ADAMW = {
    torch.float32: [
        "0x1.19be900000000p-8", "-0x1.9b53880000000p-7", "0x1.afa57e0000000p-6",
        "-0x1.dbb7680000000p-8",
    ],
    torch.bfloat16: [
        "0x1.1c00000000000p-8", "-0x1.9c00000000000p-7", "0x1.b000000000000p-6",
        "-0x1.dc00000000000p-8",
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", PSYCHES_ADAMW)
def test_adamw_has_the_bits_of_libtorchs(dtype: torch.dtype) -> None:
    """`torch::optim::AdamW` of torch 2.13, three steps on a CPU.

    Python's `torch.optim.AdamW`, and Python's operators in bfloat16, round otherwise.
    """
    start = torch.tensor([5e-3, -1.25e-2, 3e-2, 1e-4], dtype=dtype)
    steps = [[0.1, -0.2, 1e-4, 0.3], [-0.3, 0.7, 2e-5, 0.01], [0.05, 0.1, -3e-3, 1.0]]
    options = {"betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1e-8, "clip_grad_norm": None}
    parameter = torch.nn.Parameter(start)
    with torch.no_grad():
        optimizer = make_optimizer({"AdamW": options}, [parameter])
        for gradient in steps:
            parameter.grad = torch.tensor(gradient, dtype=dtype)
            optimizer.step([], 3e-3)
            assert parameter.grad is None, "as libtorch leaves it"
    assert [x.hex() for x in parameter.tolist()] == PSYCHES_ADAMW[dtype]


def test_ranks_take_rank_0s_choices_and_its_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(compat, "default_store", lambda: store)
    said = stand_in._Choices("eager", 77, "float32", "2.11.0")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert stand_in._agree(said) == said
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    own = stand_in._Choices("sdpa", None, "bfloat16", "2.11.0")
    assert stand_in._agree(own) == said
    with pytest.raises(ValueError, match=r"this rank has torch 2.13.0, rank 0 2.11.0"):
        stand_in._agree(stand_in._Choices("sdpa", None, "bfloat16", "2.13.0"))


def test_configured_types() -> None:
    nested = {"text_config": {"dtype": "float16"}}
    for config, dtype in (
        ({}, torch.float32), ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32), (nested, torch.float16),
    ):  # fmt: skip
        assert stand_in._stored_dtype(config) == dtype
    for wrong in ("int8", "half-ish"):
        with pytest.raises(ValueError, match="wanted a floating-point type"):
            stand_in._stored_dtype({"dtype": wrong})
