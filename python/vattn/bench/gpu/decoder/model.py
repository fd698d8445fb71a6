"""A decoder like Llama's, of random weights: RMSNorm, rotary positions, grouped queries, SwiGLU.

Plain torch and nothing else, so that what surrounds the attention is the same for every memory. `Decoder.forward`, one
token a request, makes no decision on the host and allocates only what torch's graphs can hold, so it can be captured
once and replayed. `Decoder.prefill` is one request's whole prompt.
Thread: one; the weights never change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from vattn.attention.sdpa import attend

if TYPE_CHECKING:
    from vattn.bench.gpu.decoder.kernels import AttentionKernel
    from vattn.bench.gpu.decoder.memories import Memory

Pair = tuple[torch.Tensor, torch.Tensor]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A model's dimensions. Weights and cache have the same element type."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    dtype: torch.dtype
    rope_theta: float = 500_000.0

    @property
    def token_bytes(self) -> int:
        """Of keys and values, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.ffn
        return (self.layers * layer + 2 * self.vocabulary * self.hidden) * self.dtype.itemsize


LLAMA_3_8B = Shape(32, 4096, 32, 8, 128, 14_336, 128_256, torch.bfloat16)


class Layer:
    """One layer's weights, normal with a deviation of 0.02; norms of ones."""

    def __init__(self, shape: Shape, device: torch.device, generator: torch.Generator) -> None:
        def weight(rows: int, columns: int) -> torch.Tensor:
            made = torch.empty(rows, columns, dtype=shape.dtype, device=device)
            return made.normal_(0, 0.02, generator=generator)

        heads = shape.heads + 2 * shape.kv_heads
        self.qkv = weight(heads * shape.head_dim, shape.hidden)
        self.out = weight(shape.hidden, shape.heads * shape.head_dim)
        self.gate_up = weight(2 * shape.ffn, shape.hidden)
        self.down = weight(shape.hidden, shape.ffn)
        self.attention_norm = torch.ones(shape.hidden, dtype=shape.dtype, device=device)
        self.ffn_norm = torch.ones(shape.hidden, dtype=shape.dtype, device=device)


class Decoder:
    """The model on `device`; positions up to `max_seq_len`."""

    def __init__(self, shape: Shape, device: torch.device, max_seq_len: int, seed: int = 1) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(seed)
        self.layers = [Layer(shape, device, generator) for _ in range(shape.layers)]
        size = (shape.vocabulary, shape.hidden)
        self.embedding = torch.empty(size, dtype=shape.dtype, device=device).normal_(0, 1, generator=generator)
        self.head = torch.empty(size, dtype=shape.dtype, device=device).normal_(0, 0.02, generator=generator)
        self.norm = torch.ones(shape.hidden, dtype=shape.dtype, device=device)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
        angles = torch.arange(max_seq_len, dtype=torch.float32, device=device)[:, None] * shape.rope_theta**-half
        self.cos, self.sin = angles.cos(), angles.sin()

    @torch.no_grad()
    def forward(
        self, tokens: torch.Tensor, lengths: torch.Tensor, memory: Memory, kernel: AttentionKernel, longest: int
    ) -> torch.Tensor:
        """The logits, (requests, vocabulary), of one more token a request.

        `tokens` (requests,) int64; `lengths` (requests,) int32, the token included; its keys and values are written to
        `memory` on the way. `longest` bounds the lengths: a number, so that a captured graph holds for all below it.
        """
        positions = lengths.long() - 1
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        places = memory.places(positions)
        hidden = functional.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            query, key, value = self._heads(layer, hidden, cos, sin)
            memory.write(number, places, key, value)
            keys, values = memory.layer(number)
            attended = kernel.attend(query, keys, values, lengths, memory.table, longest)
            hidden = self._after(layer, hidden, attended)
        return self._logits(hidden)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor, layer_of: Callable[[int], Pair]) -> torch.Tensor:
        """The logits, (vocabulary,), of the last of a prompt's `tokens` (n,) int64.

        `layer_of(number)`: where a layer's keys and values are written and then read, (n, kv_heads, head_dim) each.
        """
        cos, sin = self.cos[: len(tokens), None], self.sin[: len(tokens), None]
        hidden = functional.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            query, key, value = self._heads(layer, hidden, cos, sin)
            keys, values = layer_of(number)
            keys.copy_(key)
            values.copy_(value)
            attended = attend(heads_first(query), heads_first(keys), heads_first(values))
            hidden = self._after(layer, hidden, attended[0].transpose(0, 1))
        return self._logits(hidden[-1:])[0]

    def _heads(self, layer: Layer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Heads:
        """Queries, keys and values: (tokens, heads, head_dim) each."""
        shape = self.shape
        normed = functional.rms_norm(hidden, (shape.hidden,), layer.attention_norm, 1e-5)
        heads = functional.linear(normed, layer.qkv).view(len(hidden), -1, shape.head_dim)
        rotated = rotate(heads[:, : shape.heads + shape.kv_heads], cos, sin)
        return rotated[:, : shape.heads], rotated[:, shape.heads :], heads[:, shape.heads + shape.kv_heads :]

    def _after(self, layer: Layer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows the attention in a layer."""
        hidden = hidden + functional.linear(attended.flatten(1), layer.out)
        normed = functional.rms_norm(hidden, (self.shape.hidden,), layer.ffn_norm, 1e-5)
        gate, up = functional.linear(normed, layer.gate_up).chunk(2, dim=-1)
        return hidden + functional.linear(functional.silu(gate) * up, layer.down)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.rms_norm(hidden, (self.shape.hidden,), self.norm, 1e-5), self.head)


def heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """One request as torch's attention takes it: (1, heads, tokens, head_dim), a view."""
    return tokens.transpose(0, 1)[None]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: the two halves of each head as pairs, in float32. Contiguous."""
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
