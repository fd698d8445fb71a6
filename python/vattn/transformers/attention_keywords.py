"""The keywords that models give to their attention function, each honoured, known not to change the result, or refused.

What it is: the one table of what `attn_implementation="vattn"` does with a keyword. transformers hands everything that
a model knows of to the attention function, and what a function overlooks there changes the model in silence.

What it promises: a keyword that is not in the table is a ValueError, unless it is None or False. A test reads the
attention calls of every model of the installed transformers and fails on a keyword that is not here.

Thread: any; nothing here changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Parameters of `attention_forward`: it computes what they say.
HONOURED = (
    "query",
    "key",
    "value",
    "attention_mask",
    "dropout",
    "scaling",
    "is_causal",
    "position_bias",  # added to the scores
    "softcap",
    "s_aux",  # sinks: the name that most models give them
    "sinks",
    "sliding_window",  # the mask has the window; where there is none it is checked that none is needed
    "cu_seq_lens_q",  # several sequences in one row: none sees another
    "cu_seq_lens_k",
)

#: Keywords that leave the result of attention alone, and why. "eager" ignores all of them.
HARMLESS = {
    "max_length_q": "the longest of the sequences that cu_seq_lens_q names",
    "max_length_k": "the longest of the sequences that cu_seq_lens_k names",
    "position_ids": "queries and keys have been rotated; where positions begin anew the mask knows",
    "position_embeddings": "queries and keys have been rotated",
    "cache_position": "where the cache has put the tokens; the mask knows",
    "deterministic": "chooses among flash-attention's kernels for the gradient",
    "seq_idx": "for state-space layers; where positions begin anew the mask knows",
    "num_items_in_batch": "for the loss",
    "output_hidden_states": "for the model's output",
    "output_router_logits": "for the model's output",
    "return_dict": "for the model's output",
    "logits_to_keep": "for the model's output",
    "use_cache": "keys and values come from the cache already",
    "cache": "keys and values come from the cache already",
    "past_key_values": "keys and values come from the cache already",
}

#: Keywords that change the result and that cannot be honoured, and what they mean.
REFUSED = {
    "indices": "the keys that a sparse attention selects for each query",
    "block_indices": "the blocks of keys that a sparse attention selects for each query",
    "output_attentions": "returning the attention weights",
    "head_mask": "weights of the heads",
}


def check(given: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for a keyword that `attn_implementation=name` cannot honour. `given`: what no parameter took."""
    for keyword, value in given.items():
        if keyword in HARMLESS or value is None or value is False:
            continue
        what = REFUSED.get(keyword, "a keyword unknown to it, which may change the result")
        raise ValueError(
            f'attn_implementation="{name}" does not support {keyword} ({what}), and the model gives {_kind(value)}; '
            'load the model with attn_implementation="eager"'
        )


def _kind(value: Any) -> str:
    """What a value is, without its contents."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return repr(value) if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"
