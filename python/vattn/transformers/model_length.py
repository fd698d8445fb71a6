"""How long a sequence a model is made for, from its configuration.

What it is: the default of `VattnCache(config, max_seq_len=None)`. A configuration names its length in one of a few
ways; a model whose positions are relative (T5, BLOOM) names none.

Thread: any; a pure function.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

#: Names of the length of a decoder's sequence, the usual one first. `n_positions` and `n_ctx` come under it too.
NAMES = (
    "max_position_embeddings",
    "max_decoder_position_embeddings",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)


def model_length(config: PreTrainedConfig) -> int:
    """The most tokens that the (text) decoder of `config` is made for; 0 where it names no number.

    Where rotary positions are stretched by a factor over a length of their own, the stretched length counts too.
    """
    text = config.get_text_config(decoder=True)
    found = [_whole(getattr(text, name, None)) for name in NAMES]
    named = next((length for length in found if length), 0)
    return max(named, _stretched(text)) if named else 0


def refuse_no_length(config: PreTrainedConfig, max_seq_len: int) -> None:
    """ValueError where `max_seq_len` is what `model_length` gave, and that is nothing."""
    if not max_seq_len:
        raise ValueError(
            f"max_seq_len=None: a {type(config).__name__} does not say how long a sequence may get (it has none of "
            f"{', '.join(NAMES)}); give max_seq_len, which reserves addresses, not memory"
        )


def _stretched(text: PreTrainedConfig) -> int:
    rope: Any = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return 0
    factor, original = rope.get("factor"), _whole(rope.get("original_max_position_embeddings"))
    return int(factor * original) if isinstance(factor, (int, float)) and factor > 0 else 0


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
