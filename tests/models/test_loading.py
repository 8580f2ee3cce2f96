"""Loading: the same numbers as from_pretrained, for every architecture and form of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from psyche_fast.batch import Batch
from psyche_fast.models import CausalLM, load_model
from psyche_fast.models.source import FilesSource, TensorsSource, resolve_model
from tests.groups import in_process
from tests.memory import give_back_at_once, needs_proc, peak

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        # Scaled frequencies are computed otherwise than plain ones.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},  # tied, and scales its embeddings by a buffer
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # learned positions, transposed layers
    "gpt_neox": {},
    "gpt_neo": {  # causal masks as buffers
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},  # sinusoids as buffers
    "bloom": {"n_head": 4},
    "mixtral": EXPERTS,  # experts are stacked on the way in
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "mamba": {"state_size": 4},
}
EAGER_ONLY = {"gemma2", "gpt_neo", "gptj", "bloom", "mamba"}
IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def _load(folder: Path | str, **kwargs: Any) -> CausalLM:
    kwargs = {"param_dtype": torch.float32, **kwargs}
    return load_model(resolve_model(str(folder)), device=CPU, **kwargs)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logits_are_exactly_those_of_from_pretrained(save_model, model_type: str) -> None:
    folder = save_model(model_type, **ARCHITECTURES[model_type])
    attention = "eager" if model_type in EAGER_ONLY else "sdpa"
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    model = _load(folder, attn_implementation=attention)
    model.eval()
    with torch.no_grad():
        logits, loss = model.forward(Batch(IDS, labels=IDS))
        expected = reference(IDS, labels=IDS, use_cache=False)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    # And back: the same names and values as were read.
    gathered, saved = dict(model.full_state_dict_iter()), _tensors(folder)
    assert gathered.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_tied_weights_stay_tied(save_model, model_type: str) -> None:
    config = {**ARCHITECTURES[model_type], "tie_word_embeddings": True}
    folder = save_model(model_type, **config)
    assert "lm_head.weight" not in _tensors(folder), "the checkpoint omits it"
    model = _load(folder, attn_implementation="eager")
    module = model.module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert "lm_head.weight" not in model.named_parameters()
    optimizer = torch.optim.SGD(model.named_parameters().values(), lr=1.0)
    model.loss(Batch(IDS)).backward()
    optimizer.step()
    assert "lm_head.weight" not in dict(model.full_state_dict_iter())
    torch.testing.assert_close(
        module.get_output_embeddings().weight, module.get_input_embeddings().weight
    )


def _rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = _tensors(folder)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tied_weights_that_are_there_twice(save_model) -> None:
    folder = save_model("llama", tie_word_embeddings=True)
    embedding = _tensors(folder)["model.embed_tokens.weight"]
    _rewrite(folder, **{"lm_head.weight": embedding.clone()})
    torch.testing.assert_close(_load(folder).module.lm_head.weight.detach(), embedding)
    _rewrite(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"ties lm_head.weight to .* tie_word_embeddings"):
        _load(folder)
    # Some checkpoints have only the head.
    _rewrite(folder, **{"lm_head.weight": embedding + 1, "model.embed_tokens.weight": None})
    torch.testing.assert_close(_load(folder).module.model.embed_tokens.weight, embedding + 1)


def test_shards(save_model) -> None:
    folder = save_model("llama", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    reference = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, param in _load(folder).named_parameters().items():
        torch.testing.assert_close(param.detach(), reference[name], rtol=0, atol=0)


def test_files_from_several_folders(save_model, tmp_path: Path) -> None:
    folder = save_model()
    (tmp_path / "elsewhere").mkdir()
    (folder / "config.json").rename(tmp_path / "elsewhere" / "config.json")
    files = (folder / "model.safetensors", tmp_path / "elsewhere" / "config.json")
    model = load_model(FilesSource(files), device=CPU, param_dtype=torch.float32)
    assert model.loss(Batch(IDS)).isfinite()


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_tensors_from_rank_0(save_model, model_type: str) -> None:
    folder = save_model(model_type, **ARCHITECTURES[model_type])
    source = TensorsSource((folder / "config.json").read_text(), _tensors(folder))
    model = load_model(source, device=CPU, param_dtype=torch.float32)
    torch.testing.assert_close(model.loss(Batch(IDS)), _load(folder).loss(Batch(IDS)))
    # The source stays the sender's: training must not write to it.
    kept = source.tensors["model.norm.weight"].clone()
    model.module.model.norm.weight.data.zero_()
    torch.testing.assert_close(source.tensors["model.norm.weight"], kept)


def test_bf16_keeps_rotary_frequencies_in_fp32(save_model) -> None:
    folder = save_model("llama")
    model = load_model(resolve_model(str(folder)), device=CPU)
    assert {p.dtype for p in model.named_parameters().values()} == {torch.bfloat16}
    # head_dim 8, theta 10000: by the definition, in float64.
    expected = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    frequencies = model.module.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)


def test_bf16_keeps_in_fp32_what_the_architecture_does(save_model) -> None:
    folder = save_model("deepseek_v3", **ARCHITECTURES["deepseek_v3"])
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4])  # no numbers of bf16
    model = load_model(resolve_model(str(_rewrite(folder, **{name: bias}))), device=CPU)
    torch.testing.assert_close(dict(model.full_state_dict_iter())[name], bias, rtol=0, atol=0)


def test_tables_of_bf16_models_are_computed_in_fp32(save_model) -> None:
    folder = save_model("gptj", **{**ARCHITECTURES["gptj"], "rotary_dim": 8})
    model = load_model(resolve_model(str(folder)), device=CPU, attn_implementation="eager")
    angles = torch.arange(64)[:, None] * 10000.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75])
    expected = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = model.module.transformer.h[0].attn.embed_positions
    torch.testing.assert_close(table.float(), expected, rtol=0, atol=2**-9)


def test_numbers_that_are_not_finite_are_read_and_written(save_model, tmp_path: Path) -> None:
    folder = save_model("mamba2", num_heads=8, head_dim=8, state_size=4, n_groups=1)
    limit = json.loads((folder / "config.json").read_text())["time_step_limit"]
    assert limit == [0.0, {"__float__": "Infinity"}]
    model = _load(folder, attn_implementation="eager")
    assert model.module.config.time_step_limit[1] == float("inf")
    model.save_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["time_step_limit"] == limit


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.norm.weight": None}, "the checkpoint lacks model.norm.weight"),
        (
            {"model.layers.1.mlp.up_proj.weight": None, "lm_head.weight": None},
            "lacks lm_head.weight, model.layers.1.mlp.up_proj.weight",
        ),
        ({"model.norm.bias": torch.zeros(32)}, "no place for model.norm.bias"),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 31)},
            r"q_proj.weight has the shape \[32, 31\], the configuration wants \[32, 32\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(save_model, changes, says: str) -> None:
    folder = _rewrite(save_model("llama"), **changes)
    with pytest.raises(ValueError, match=says):
        _load(folder)


@pytest.mark.parametrize("expert", ["experts.3.w1.weight", "experts.3.w2.weight"])
def test_a_missing_expert_is_an_error(save_model, expert: str) -> None:
    folder = save_model("mixtral", **EXPERTS)
    name = f"model.layers.0.block_sparse_moe.{expert}"
    assert name in _tensors(folder)
    _rewrite(folder, **{name: None})
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts"):
        _load(folder)


def test_old_checkpoints_may_hold_buffers(save_model) -> None:
    folder = save_model("llama")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0)}
    model = _load(_rewrite(folder, **old))
    assert model.module.model.rotary_emb.inv_freq.max() == 1.0


def test_a_malformed_value_in_the_config(save_model) -> None:
    folder = save_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config.json: .*hidden_size") as caught:
        _load(folder)
    assert "\n" not in str(caught.value)


class TestSequenceLength:
    @pytest.mark.parametrize("kind", ["default", "dynamic", "longrope"])
    def test_the_rotary_function_stays_the_models(self, save_model, tmp_path, kind: str) -> None:
        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
        if kind == "longrope":
            rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
            rope |= {"original_max_position_embeddings": 16}
        folder = save_model("llama", rope_parameters=rope)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = _load(folder, sequence_length=200)
        for length in (200, 8):
            ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                expected = reference(ids, use_cache=False).logits
            torch.testing.assert_close(model.forward(Batch(ids))[0], expected, rtol=0, atol=0)
        model.save_config(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["max_position_embeddings"] == 64
        assert saved["architectures"] == ["LlamaForCausalLM"]

    def test_a_shorter_one_leaves_the_model_as_it_is(self, save_model) -> None:
        assert (
            _load(save_model("llama"), sequence_length=16).config["max_position_embeddings"] == 64
        )

    def test_learned_positions_have_an_end(self, save_model) -> None:
        folder = save_model("gpt2", **ARCHITECTURES["gpt2"])
        assert _load(folder, sequence_length=64).loss(Batch(IDS)).isfinite()
        with pytest.raises(
            ValueError, match=r"--sequence-length 65 is more than the 64 positions .*wpe.weight"
        ):
            _load(folder, sequence_length=65)

    def test_masks_in_buffers_grow_with_it(self, save_model) -> None:
        folder = save_model("gptj", **ARCHITECTURES["gptj"])
        model = _load(folder, sequence_length=100, attn_implementation="eager")
        assert model.loss(Batch(torch.ones(1, 100, dtype=torch.int64))).isfinite()
        assert model.module.config.max_position_embeddings == 100


def test_activation_checkpointing_changes_no_name_and_no_gradient(save_model) -> None:
    folder = save_model("llama")
    plain, recomputed = _load(folder), _load(folder, activation_checkpointing=True)
    assert plain.named_parameters().keys() == recomputed.named_parameters().keys()
    saved: dict[str, int] = {}
    for key, model in (("plain", plain), ("recomputed", recomputed)):
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(Batch(IDS))
        saved[key] = sum(kept)
        loss.backward()
    assert saved["recomputed"] < saved["plain"] / 3
    for name, param in plain.named_parameters().items():
        torch.testing.assert_close(recomputed.named_parameters()[name].grad, param.grad)


def test_rows_whose_labels_do_not_count_give_zero(save_model) -> None:
    model = _load(save_model("llama"))
    loss = model.loss(Batch(IDS, labels=torch.full_like(IDS, -100)))
    loss.backward()
    assert loss.item() == 0.0
    grads = [p.grad for p in model.named_parameters().values()]
    assert all(g is not None and not g.any() for g in grads)


def test_forward_keeps_the_last_logits_and_scales_the_loss(save_model) -> None:
    model = _load(save_model("llama"))
    labels = IDS.clone()
    labels[0, :9] = -100
    logits, loss = model.forward(Batch(IDS, labels))
    few, scaled = model.forward(Batch(IDS, labels), num_logits_to_keep=3, loss_scale=4.0)
    torch.testing.assert_close(few, logits[:, -3:])
    torch.testing.assert_close(scaled * 4, loss)
    picked = logits[:, :-1].double().log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    real = labels[:, 1:] != -100
    expected = -(picked * real).sum() / real.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_the_routers_own_loss_is_added_where_it_is_asked_for(save_model) -> None:
    folder = save_model("mixtral", **EXPERTS, output_router_logits=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model = _load(folder)
    model.train()
    expected = reference(IDS, labels=IDS, use_cache=False)
    assert expected.aux_loss > 0
    assert model.loss(Batch(IDS)).item() == pytest.approx(expected.loss.item(), abs=1e-6)


def test_liger_is_refused_rather_than_left_out(save_model) -> None:
    with pytest.raises(ValueError, match="--liger needs a CUDA device, got cpu"):
        _load(save_model("llama"), liger=True)


def _grows(small: Path, large: Path) -> tuple[int, int]:
    """Bytes of the large model, and by how much the process grows while it loads it."""
    _load(small)  # caches and pools
    give_back_at_once()
    with peak() as grown:
        model = _load(large)
    return sum(p.nbytes for p in model.named_parameters().values()), grown[0]


@needs_proc
@pytest.mark.processes
def test_there_is_no_second_copy_in_memory(save_model) -> None:
    small = save_model("llama")
    large = save_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    size, grown = in_process(_grows, small, large)
    assert size > 80e6
    assert grown > 0.8 * size, "it was measured"
    assert grown < 1.25 * size, f"{grown / size:.2f} times the model"
