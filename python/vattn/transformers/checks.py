"""What can be said before any token: options that nobody takes, a model of which nothing is held, a length too long.

What it promises: each check raises a TypeError or ValueError that names the parameter, the value and the way out, or
warns, and changes nothing.

Thread: any; no state.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

import vattn


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that no KVCache takes, by making a small one, where the model's keys are not needed to tell."""
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return
    pool = given.get("pool")
    if isinstance(pool, vattn.PagePool):
        given.setdefault("device", pool.device)
    elif str(given.get("device", "cpu")).startswith("cuda"):
        # No device is opened for a check. Of the host's options only "zeros" is refused there, with the first tokens.
        given |= {"device": "meta", "unmapped_reads": None}
    layers = given.get("layers_per_tensor")
    small: dict[str, Any] = {"dtype": "float32", "device": "cpu", "lookahead_tokens": 0, "warm_tokens": 0} | given
    count = layers if isinstance(layers, int) and layers > 0 else 1
    vattn.KVCache(count, 1, 1, max_batch_size=1, max_seq_len=1, **small).close()


def say_what_is_held(config: Any, held: int, layers: int, others: Sequence[Any]) -> None:
    """ValueError where none of a model's layers would live in vattn memory, a warning where only a part does."""
    if held and not others:
        return
    kinds = Counter(_kind(layer) for layer in others)
    rest = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no layer keeps keys of all tokens"
    name = type(config).__name__
    if not held:
        raise ValueError(
            f"config={name}: none of its {layers} layers would live in vattn memory ({rest}), so that no option or "
            "limit given here would have an effect; use DynamicCache(config=model.config) for this model"
        )
    warnings.warn(
        f"VattnCache holds {held} of the {layers} layers of {name}; transformers keeps the others ({rest}), and their "
        "memory is not in stats() or memory_limit",
        UserWarning,
        stacklevel=3,
    )


def refuse_a_length_that_cannot_fit(max_seq_len: int, caller: FrameType) -> None:
    """ValueError where `generate`, seen from inside as `caller`, may need more tokens in the cache than `max_seq_len`.

    It has no other way to tell the cache; any other caller, or a release that calls it otherwise, is left to the check
    of each step.
    """
    if caller.f_code.co_name != "_prepare_cache_for_generation":
        return
    longest = caller.f_locals.get("max_cache_length")
    if isinstance(longest, int) and longest > max_seq_len:
        raise ValueError(
            f"max_seq_len={max_seq_len}, but generate may need {longest} tokens in the cache (max_length or prompt and "
            "max_new_tokens, less the last token): make the cache with a larger max_seq_len (it reserves addresses, "
            "not memory), or ask generate for fewer tokens"
        )


def _kind(layer: Any) -> str:
    """What a reader of a config calls the layer."""
    parts = [type(layer).__name__]
    if getattr(layer, "is_sliding", False):
        parts = [f"with a sliding window of {layer.sliding_window}"]
        if hasattr(layer, "conv_states"):
            parts.append("and states")
    elif hasattr(layer, "conv_states"):
        parts = ["with states (linear attention, state space or convolution)"]
    return " ".join(parts)
