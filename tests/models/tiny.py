"""A tiny configuration of any of Transformers' causal language models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from psyche_fast.compat import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every `model_type` of the installed Transformers that has a causal language model."""

_SIZES: dict[int, str] = {
    96: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    64: "intermediate_size ffn_dim d_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim n_inner "
    "dim_ff max_position_embeddings n_positions seq_length max_seq_len n_ctx context_length "
    "max_target_positions max_source_positions intermediate_size_mlp feed_forward_size "
    "expand_intermediate_size attention_hidden_size model_max_length",
    32: "hidden_size n_embd d_model dim_model embedding_size emb_dim embedding_dim "
    "word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size "
    "expert_ffn_hidden_size shared_intermediate_size input_embedding_size output_embedding_size "
    "hidden_size_global lru_width router_hidden_size pronunciation_embed_dim shape_embed_dim "
    "moe_shared_expert_intermediate_size dense_intermediate_size cross_attention_hidden_size",
    16: "q_lora_rank kv_lora_rank gated_norm_rank adapter_rank num_mel_bins image_size "
    "state_size ssm_state_size mamba_d_state mamba_state_dim chunk_size mamba_chunk_size "
    "pronunciation_vocab_size shape_vocab_size o_lora_rank",
    8: "head_dim global_head_dim swa_head_dim d_head d_kv attention_head_dim qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim swa_v_head_dim sliding_window index_head_dim index_topk "
    "attention_chunk_size rotary_dim mamba_d_head mamba_headdim mamba_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim hidden_size_per_layer_input kv_channels mamba_dt_rank "
    "time_step_rank local_attention_window_len attention_window_size dim_head patch_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "attention_heads swa_num_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts index_n_heads linear_num_heads linear_num_value_heads num_query_groups",
    2: "num_key_value_heads num_global_key_value_heads swa_num_key_value_heads "
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers decoder_num_layers num_blocks num_experts_per_tok "
    "num_experts_per_token top_k moe_topk moe_k linear_num_key_heads block_size "
    "attn_layer_period expert_layer_period",
    1: "bos_token_id decoder_start_token_id n_group topk_group num_expert_group "
    "first_k_dense_replace num_dense_layers attn_layer_offset n_groups mamba_n_groups "
    "mamba_ngroups mamba_num_groups expert_layer_offset num_random_blocks",
    0: "pad_token_id padding_idx num_nextn_predict_layers",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NOTE = {
    "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "per_layer_config": {"01": {"num_attention_heads": 2, "num_key_value_heads": 2}},
    "head_dim": 16,
}
_QWEN4 = {
    "layer_types": ["linear_attention", "full_attention"],
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_GEMMA4 = {"per_layer_config": {"01": {"head_dim": 16}}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(["full_attention", "sliding_attention"], _ROPE)
    },
    "ctrl": {"dff": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _NOTE,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _NOTE,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "got_ocr2": {
        "vision_config": {"output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [1]}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16], "attention_head_size": 8, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 8,  # its parts are tied by numbers that begin with the third hybrid
        "layers_block_type": [
            "linear_attention" if at in (0, 1, 3, 4, 6) else "hybrid" for at in range(8)
        ],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What some architectures want otherwise."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A model of a few thousand weights with a layer of each of the architecture's kinds."""
    config = CONFIG_MAPPING[model_type]
    given = _shrunk(config, OVERRIDES.get(model_type, {}))
    return config(**{**given, **changes})


def _shrunk(kind: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    whole = kind()
    fields = whole.to_dict()
    parts = [name for name in kind.sub_configs if fields.get(name) is not None]
    given: dict[str, Any] = {n: SIZES[n] for n, v in fields.items() if n in SIZES and v is not None}
    given |= {
        n: SIZES[n]
        for n in ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
        if n in fields
    }
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    layers = next((v for n, v in fields.items() if n in ("num_hidden_layers", "n_layer")), None)
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in fields.items()
        if isinstance(value, list) and layers == len(value) and name.endswith(("types", "type"))
    }  # fmt: skip
    if kinds:
        count = max(2, *map(len, kinds.values()))
        given |= {name: [*own, *own[-1:] * (count - len(own))] for name, own in kinds.items()}
        given["num_hidden_layers"] = count
    # Nothing drawn at random: a sharded model draws other numbers.
    given |= {n: 0.0 for n, v in fields.items() if "drop" in n and isinstance(v, float)}
    given |= {n: v for n, v in overrides.items() if not isinstance(v, dict) or n not in parts}
    for name in parts:
        given[name] = _shrunk(type(getattr(whole, name)), overrides.get(name, {}))
    return given
