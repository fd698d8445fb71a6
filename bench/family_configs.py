"""Tiny configurations of every causal language model of the installed transformers.

What it is: a general table of sizes by the name of a configuration's attribute, lists of one entry a layer shortened so
that every kind of layer stays, and one table of what single families need besides.

What it promises: windows, chunks and top-k selections are shorter than the prompts of `family_check.py`, so that they
matter; no token ends a generation.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers

VOCAB = 128
LAYERS = 2  # where no list of layers says otherwise

_HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _FFN = 64, 4, 2, 16, 48
_WINDOW = 8

#: Sizes by names of attributes. A name counts where the default configuration has a number there.
_SIZES_OF: list[tuple[str, int]] = [
    (
        "hidden_size d_model n_embd dim_model embedding_size word_embed_proj_dim lru_width attention_hidden_size",
        _HIDDEN,
    ),
    ("emb_dim embedding_dim hidden_size_global input_size", _HIDDEN),
    ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", _HEADS),
    ("attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads", _HEADS),
    ("num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_global_key_value_heads", _KV_HEADS),
    ("num_query_groups", _KV_HEADS),
    ("head_dim v_head_dim qk_nope_head_dim dim_head kv_channels global_head_dim swa_head_dim d_head", _HEAD_DIM),
    ("swa_v_head_dim attention_head_size attention_head_dim linear_head_dim", _HEAD_DIM),
    ("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size moe_intermediate_size d_inner", _FFN),
    ("dff dim_ff d_ff n_inner shared_expert_intermediate_size moe_shared_expert_intermediate_size hidden_dim", _FFN),
    ("intermediate_size_mlp shared_experts_intermediate_size expert_ffn_hidden_size dense_intermediate_size", _FFN),
    ("feed_forward_size", _FFN),
    ("vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size", VOCAB),
    ("max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions", 128),
    ("context_length", 128),
    ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers", LAYERS),
    ("num_encoder_layers depth", LAYERS),
    # Latent attention and its index.
    ("kv_lora_rank o_lora_rank index_head_dim", 16),
    ("q_lora_rank qk_head_dim", _HEAD_DIM + 8),
    ("qk_rope_head_dim", 8),
    ("index_n_heads", 2),
    ("index_topk", 6),
    # Experts.
    ("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    ("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num", 2),
    ("n_group topk_group num_expert_group n_shared_experts num_shared_experts", 1),
    ("first_k_dense_replace num_dense_layers moe_layer_end_index", 1),
    # Windows.
    ("sliding_window sliding_window_size attention_chunk_size attention_window_size local_attention", _WINDOW),
    ("keep_window_size", _WINDOW),
    ("max_window_layers", 1),
    # State-space and linear layers. Heads times their dim is the hidden size times `expand`, 2.
    ("mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size", 8),
    ("mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank linear_num_heads linear_num_value_heads", 4),
    ("mamba_d_head mamba_head_dim mamba_headdim", 32),
    ("mamba_n_groups n_groups mamba_ngroups", 1),
    ("mamba_d_ssm", 128),
    ("linear_num_key_heads", 2),
    ("linear_key_head_dim linear_value_head_dim", _HEAD_DIM),
    # The rest.
    ("rotary_dim", 8),
    ("query_pre_attn_scalar hidden_size_per_layer_input", 16),
    ("original_max_position_embeddings", 64),
    ("num_nextn_predict_layers", 0),
]
_SIZES = {name: size for names, size in _SIZES_OF for name in names.split()}

#: In models with latent attention the head that rotates is the rotary part, and every query head has keys.
_LATENT = {"head_dim": 8, "num_key_value_heads": _HEADS}

#: Numbers that stay what they are, since a size of the table means something else there.
_TOKENS = ("_token_id", "_token_index")

#: Lists of one entry a layer whose entries are numbers of layers: derived anew by the configuration.
_DERIVED = ("moe_layers", "full_attn_idxs", "mlp_only_layers", "hybrid_layer_ids", "cross_attention_layers")

_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")

#: What single families need besides, or instead (None: leave it to the configuration).
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "blt_local_encoder": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": _KV_HEADS, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": _FFN, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": _HIDDEN},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "n_recurrent_loops": 2,
    },
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": _FFN,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dots3_note_text": {"num_key_value_heads": _HEADS},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [_FFN] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "ministral": {"head_dim": _HEAD_DIM},
    "mpt": {"max_seq_len": None},
    "nemotron": {"num_key_value_heads": _KV_HEADS},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 4, "attention_head_dim": None},
    "zaya": {"num_experts_per_tok": 1},
}


class NoTinyConfigError(Exception):
    """A family for which no tiny configuration is known."""


def tiny_config(model_type: str, model_class: type) -> Any:
    """A small configuration for `model_class` of the family, with a window or a selection wherever it has one."""
    kind = model_class.config_class or transformers.CONFIG_MAPPING[model_type]
    try:
        return kind(**_tiny(kind))
    except Exception as error:
        raise NoTinyConfigError(f"{type(error).__name__}: {error}") from error


def _tiny(kind: type) -> dict[str, Any]:
    """Arguments of the constructor of the configuration class `kind`."""
    default = kind()
    values = default.to_dict()
    given: dict[str, Any] = {}
    for name in kind.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            given[name] = {**_tiny(type(inner)), "model_type": inner.model_type}
    layers = next((values[name] for name in ("num_hidden_layers", "n_layer") if name in values), None)
    kept = _kept_layers(values, layers)
    sizes = {**_SIZES, **(_LATENT if isinstance(values.get("kv_lora_rank"), int) else {})}
    for name, value in values.items():
        if name in given or name in _DERIVED:
            continue
        if name.endswith(_TOKENS):
            if isinstance(value, int) and value >= VOCAB:
                given[name] = 3
        elif isinstance(value, int) and not isinstance(value, bool) and name in sizes:
            given[name] = len(kept) if kept and value == layers and "layer" in name else sizes[name]
        elif isinstance(value, list) and kept and len(value) == layers:
            given[name] = [value[layer] for layer in kept]
        elif isinstance(value, dict) and name == "rope_parameters":
            given[name] = _rope(value)
    if "bos_token_id" in values:
        given["bos_token_id"] = 1
    given |= {"pad_token_id": 0, "eos_token_id": None}
    if values.get("vocab_size") is None:
        given.pop("pad_token_id")
    given |= copy.deepcopy(SPECIAL.get(kind.model_type, {}))
    return {name: value for name, value in given.items() if name not in _left_out(kind)}


def _left_out(kind: type) -> set[str]:
    return {name for name, value in SPECIAL.get(kind.model_type, {}).items() if value is None}


def _kept_layers(values: dict[str, Any], layers: int | None) -> list[int]:
    """The first layer of every kind, and at least LAYERS of them; nothing where no list names kinds."""
    lists = [values[name] for name in _KINDS if isinstance(values.get(name), list) and len(values[name]) == layers]
    if not lists:
        return []
    kinds = list(zip(*lists, strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})
    return kept if len(kept) >= LAYERS else sorted({*kept, *range(min(LAYERS, len(kinds)))})


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections fit a head of _HEAD_DIM."""
    changed = copy.deepcopy(value)
    for inner in [changed, *(part for part in changed.values() if isinstance(part, dict))]:
        if "mrope_section" in inner:
            inner["mrope_section"] = [2, 3, 3]
        inner.pop("short_factor", None)
        inner.pop("long_factor", None)
    return changed
