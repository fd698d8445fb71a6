"""A Llama of transformers, run layer by layer over a vattn.KVCache: what the last step added goes in, logits come out.

Any `LlamaForCausalLM` will do; its modules do the work, and the cache is written and read where they would concatenate.
Thread: one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vattn
from vattn.attention import decode, prefill


class Llama:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.head_dim = getattr(model.config, "head_dim", None) or (
            model.config.hidden_size // model.config.num_attention_heads
        )
        end = model.config.eos_token_id
        self.end_tokens = set(end) if isinstance(end, list) else {end} - {None}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def make_cache(self, **shape: Any) -> vattn.KVCache:
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        return vattn.KVCache(layers, heads, self.head_dim, dtype=self.model.dtype, device=self.device, **shape)

    def forward(self, tokens: list[int], rows: vattn.Rows) -> torch.Tensor:
        """Logits after the last token of each slot; `tokens` are those that the last step added, slot after slot."""
        llama, added = self.model.model, rows.added
        x = llama.embed_tokens(torch.tensor(tokens, device=self.device))[None]
        cos, sin = llama.rotary_emb(x, rows.positions[None])
        for number, layer in enumerate(llama.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, self.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
            rows.write(number, k[0], v[0])
            x = x + attention.o_proj(attend(q[0], rows, number, added).flatten(-2)[None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        last = torch.tensor(added, device=self.device).cumsum(0) - 1
        logits: torch.Tensor = self.model.lm_head(llama.norm(x[0, last]))
        return logits


def attend(q: torch.Tensor, rows: vattn.Rows, layer: int, added: list[int]) -> torch.Tensor:
    if max(added) == 1:
        return decode(q, rows, layer)
    out = prefill(list(q.split(added)), rows, layer)
    return torch.cat(list(out))
