"""The geometry of a model from its `config.json`, as Hugging Face writes it, and what of it a cache cannot honour.

Promise: what decides the bytes of a token is read from the file or refused with the field's name; nothing is guessed
from the model's name and nothing is downloaded. What makes the figures an upper bound, or leaves a part of the memory
out, comes back as notes in plain words. Thread: any.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattn.tools.geometry import DTYPE_BYTES, Geometry

#: Where a model of several parts keeps its language model's numbers.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "talker_config")
# The names of a number in configurations old and new, the commonest first. A decoder's own come before those it shares.
_LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = (
    "decoder_attention_heads",
    "num_decoder_attention_heads",
    "num_attention_heads",
    "attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "d_kv")
#: Numbers that some layers have of their own, and the one that the others have.
_OTHER_SHAPES = {
    "global_head_dim": _HEAD_DIM,
    "swa_head_dim": _HEAD_DIM,
    "swa_v_head_dim": ("v_head_dim",),
    "num_global_key_value_heads": _KV_HEADS,
    "swa_num_key_value_heads": _KV_HEADS,
}
#: Layers that look at no earlier token's key: they have a state of one size.
_WITHOUT_TOKENS = ("linear", "mamba", "conv", "recurrent", "ssm", "moe", "mlp", "gdn", "kda")
#: Signs of such layers; where a file has one it must say which layers keep tokens.
_STATES = ("mamba_d_state", "ssm_state_size", "state_size", "linear_num_value_heads", "linear_attn_config")
#: Models without layers that keep tokens.
_NO_TOKENS = ("mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv")
_WINDOWED = ("sliding", "chunked", "window", "local")


@dataclass(frozen=True)
class ModelConfig:
    """A model's geometry, and what the numbers leave out, a sentence each."""

    geometry: Geometry
    notes: tuple[str, ...]


def read_config(path: str) -> ModelConfig:
    """Read a `config.json`, or the one in a folder. OSError, or ValueError that names the file and the field."""
    file = Path(path)
    if file.is_dir():
        file /= "config.json"
        if not file.exists():
            raise ValueError(f"{path}: a folder without a config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds {type(found).__name__}, not the fields of a model's configuration")
    try:
        return of_fields(found, _name_of(found, file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def of_fields(config: dict[str, Any], name: str | None = None) -> ModelConfig:
    """The geometry that the fields of a configuration describe. ValueError names the field."""
    outer, notes = config, []
    while inner := next((config[key] for key in _NESTED if isinstance(config.get(key), dict)), None):
        config = {"is_encoder_decoder": config.get("is_encoder_decoder"), **inner}
        notes = ["It has parts beside the language model; only the language model's cache is counted."]
    if isinstance(config.get("attn_config"), dict):  # MPT
        config = {**config["attn_config"], **config}
    if config.get("model_type") in _NO_TOKENS:
        raise ValueError(f"model_type={config['model_type']!r}: none of its layers keeps keys of tokens")
    _refuse_other_shapes(config)
    layers, more = _layers_with_tokens(config)
    notes += more
    heads, dim, value_dim = _head_shape(config)
    if _number(config, ("kv_lora_rank",)):
        notes.append("Its attention is latent (MLA): keys only, one latent and its rotary part a token.")
    if _number(config, ("index_head_dim",)):
        notes.append(f"Keys of its index (index_head_dim={config['index_head_dim']}) are not counted.")
    if config.get("is_encoder_decoder"):
        notes.append("Counted is the decoder's own attention; keys of the encoder's tokens come on top.")
    dtype, more = _dtype(config, outer)
    return ModelConfig(Geometry(layers, heads, dim, value_dim, dtype, name), (*notes, *more))


def _name_of(config: dict[str, Any], file: Path) -> str:
    given = config.get("_name_or_path") or config.get("model_type")
    return given if isinstance(given, str) and given.isprintable() else file.name


def _number(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these fields that is there and not null, a whole number from 0 on."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, list):
            raise ValueError(
                f"{name} has a value a layer; a cache has one for all: give --num-layers, --num-kv-heads and "
                "--head-dim of the layers that you plan for"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise ValueError(f"{name}={value!r} is not a number of anything")
        return value
    return None


def _count(config: dict[str, Any], names: tuple[str, ...]) -> int:
    value = _number(config, names)
    if not value:
        raise ValueError(f"none of {', '.join(names)} is there, or it is 0: is it a language model's configuration?")
    return value


def _refuse_other_shapes(config: dict[str, Any]) -> None:
    if config.get("block_configs"):
        raise ValueError("block_configs gives each layer a shape of its own; a cache has one for all its layers")
    usual: tuple[str, ...]
    for layer, fields in (config.get("per_layer_config") or {}).items():
        for usual in (_HEAD_DIM, _KV_HEADS, ("v_head_dim",)):
            other, common = _number(fields, usual), _number(config, usual)
            if other is not None and other != common:
                raise ValueError(_two_shapes(f"per_layer_config[{layer}] has {usual[0]}={other}", common))
    for name, usual in _OTHER_SHAPES.items():
        other, common = _number(config, (name,)), _number(config, usual)
        if other is not None and common is not None and other != common:
            raise ValueError(_two_shapes(f"{name}={other}", common))


def _two_shapes(other: str, common: int | None) -> str:
    return (
        f"{other} beside {common}: layers of two shapes, and a cache has one for all its layers; plan each kind by "
        "itself, with --num-layers, --num-kv-heads and --head-dim"
    )


def _head_shape(config: dict[str, Any]) -> tuple[int, int, int | None]:
    """KV heads, elements of a key, and of a value where it differs."""
    latent = _number(config, ("kv_lora_rank",))
    if latent:
        return 1, latent + (_number(config, ("qk_rope_head_dim",)) or 0), 0
    heads = _number(config, _HEADS)
    kv_heads = _number(config, _KV_HEADS)
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = kv_heads if config.get("multi_query_group_num") else 1
    kv_heads = heads if kv_heads is None else kv_heads
    dim = _number(config, _HEAD_DIM)
    if dim is None:
        width = _count(config, _WIDTH)
        if not heads or width % heads:
            raise ValueError(f"there is no head_dim, and {width} elements are not so many for {heads} heads alike")
        dim = width // heads
    if not kv_heads or not dim:
        raise ValueError(f"{kv_heads} key and value heads of {dim}: it has no attention that keeps keys")
    value_dim = _number(config, ("v_head_dim",))
    return kv_heads, dim, None if value_dim in (None, dim) else value_dim


def _layers_with_tokens(config: dict[str, Any]) -> tuple[int, list[str]]:
    """The layers that keep keys, and what to say of the others."""
    notes = []
    kinds = _kinds(config, _number(config, _LAYERS) or 0)
    layers = len(kinds) or _count(config, _LAYERS)
    if config.get("model_type") == "longcat_flash" and not config.get("num_hidden_layers"):
        layers *= 2  # each has two attentions
    if not kinds and (sign := next((name for name in _STATES if config.get(name)), None)):
        raise ValueError(
            f"{sign} says that some layers keep a state and no tokens, and nothing says which: give --num-layers, "
            "--num-kv-heads and --head-dim of the layers with attention"
        )
    without = [kind for kind in kinds if any(word in kind for word in _WITHOUT_TOKENS)]
    if without:
        counted = len(kinds) - len(without)
        if not counted:
            raise ValueError(
                f"all {layers} layers are {', '.join(sorted(set(without)))}: no layer keeps keys of tokens"
            )
        names = ", ".join(sorted(set(without)))
        notes.append(f"{len(without)} of {len(kinds)} layers keep no tokens ({names}): not counted.")
        layers = counted
    if hybrid := sum("hybrid" in kind for kind in kinds):
        notes.append(f"{hybrid} layers keep a state beside their keys; the state is not counted.")
    shared = _number(config, ("num_kv_shared_layers",)) or 0
    if 0 < shared < layers:
        notes.append(f"{shared} layers read the keys of earlier ones (num_kv_shared_layers): not counted.")
        layers -= shared
        kinds = kinds[: len(kinds) - shared]
    windowed = sum(any(word in kind for word in _WINDOWED) for kind in kinds)
    window = next((config[key] for key in ("sliding_window", "attention_chunk_size") if config.get(key)), None)
    if not kinds and window and config.get("use_sliding_window") is not False:
        every = config.get("sliding_window_pattern")
        windowed = layers - layers // every if isinstance(every, int) and every > 0 else layers
    if windowed:
        back = f"{window:,} tokens back" if isinstance(window, int) else "a window back"
        notes.append(
            f"{windowed} layers look only {back}; they are counted at full length, since a cache gives nothing of a "
            "window back today: an upper bound."
        )
    return layers, notes


def _kinds(config: dict[str, Any], layers: int) -> list[str]:
    """The kind of each layer, in the words of the file; empty where it does not say."""
    for name in ("layer_types", "layers_block_type", "block_types", "_block_types"):
        given = config.get(name)
        if isinstance(given, list) and given and all(isinstance(kind, str) for kind in given):
            return (given * -(-layers // len(given)))[:layers] if layers else given
    if config.get("model_type") == "falcon_h1":
        return ["hybrid"] * layers
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return ["attention" if kind == "*" else "mamba or mlp" for kind in pattern]
    for name in ("attn_layer_indices", "full_attn_idxs"):
        given = config.get(name)
        if isinstance(given, list):
            return ["attention" if layer in given else "mamba or conv" for layer in range(layers)]
    every = _number(config, ("full_attention_interval", "attn_layer_period"))
    if every:
        first = every - 1 if config.get("full_attention_interval") else _number(config, ("attn_layer_offset",)) or 0
        return ["attention" if layer % every == first else "linear or mamba" for layer in range(layers)]
    return []


def _dtype(config: dict[str, Any], outer: dict[str, Any]) -> tuple[str, list[str]]:
    for fields in (config, outer):
        given = fields.get("dtype") or fields.get("torch_dtype")
        if isinstance(given, str):
            name = given.removeprefix("torch.")
            if name in DTYPE_BYTES:
                return name, []
            return "bfloat16", [f"dtype={name!r} is none that a cache holds; bfloat16 is counted."]
    return "bfloat16", []
