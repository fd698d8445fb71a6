"""What ``replay --verify`` does: a pattern in every token in use, checked before the slot is freed.

Every token of every layer, K and V, holds bytes that no other token of the run holds at that place: they depend on the
request, on how many times its slot has been handed out, on the layer, on K or V, and on the position. A page mapped at
the wrong place, handed out twice or taken away too early shows as a mismatch. Prompts are written through ``view``,
later tokens through ``write``, and everything is read back through ``view``. Needs torch and memory that can be touched
(not ``meta``). Thread: one at a time, the one that drives the cache.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vattn.tools.geometry import Geometry

if TYPE_CHECKING:
    import torch

    import vattn

# Windows of one random buffer are the patterns: as many starts as this prime, so that strides below never line up.
_STARTS = 65_521
_PER_POSITION, _PER_LAYER, _PER_ADMISSION, _FOR_VALUES = 7_919, 15_485, 31_337, 11_003


class VerificationError(Exception):
    """A token did not hold what was written into it."""


class Verifier:
    """Writes and checks the pattern; ``verified_bytes`` counts what has been read back and found right."""

    def __init__(self, cache: vattn.KVCache, geometry: Geometry, max_batch: int) -> None:
        import torch

        self._torch = torch
        self.cache = cache
        self.geometry = geometry
        self.device = cache.layer(0)[0].device  # asked, not assumed: a stand-in for a GPU has tensors on the CPU
        self.dtype = getattr(torch, geometry.dtype)
        self.verified_bytes = 0
        self.requests = array("q", bytes(8 * max_batch))
        self.seeds = array("q", bytes(8 * max_batch))
        self.written = array("q", bytes(8 * max_batch))  # tokens of the slot that hold the pattern
        self.admissions = 0
        self._windows = {dim: self._make_windows(dim) for dim in {geometry.head_dim, geometry.value_dim} - {0}}

    def _make_windows(self, dim: int) -> torch.Tensor:
        """All windows of one token's bytes, as rows of a tensor that overlaps itself."""
        length = self.geometry.num_kv_heads * dim * self.geometry.itemsize
        # Six bits of each byte: no float type has all exponent bits set then, so no pattern is a NaN that a copy may
        # alter.
        data = bytearray(byte & 0x3F for byte in random.Random(20_231_116).randbytes(_STARTS + length - 1))
        return self._torch.frombuffer(data, dtype=self._torch.uint8).to(self.device).unfold(0, length, 1)

    def admit(self, slot: int, request: int, tokens: int) -> None:
        """The slot is new and has memory for ``tokens``: fill them."""
        self.admissions += 1
        self.requests[slot], self.seeds[slot], self.written[slot] = request, self.admissions * _PER_ADMISSION, tokens
        positions = self._torch.arange(tokens, device=self.device)
        for layer in range(self.geometry.num_layers):
            for is_value, tensor in enumerate(self.cache.view(layer, slot)):
                if tensor is not None:
                    tensor.copy_(self._pattern(self.seeds[slot], positions, layer, is_value))

    def grow(self, lengths: array[int], active: Sequence[int]) -> None:
        """Every active slot has just grown by a token: fill the new ones."""
        if not active:
            return
        torch = self._torch
        slots = list(active)
        last = [lengths[slot] - 1 for slot in slots]
        positions = torch.tensor(last, device=self.device)
        seeds = torch.tensor([self.seeds[slot] for slot in slots], device=self.device)
        for layer in range(self.geometry.num_layers):
            key = self._pattern(seeds, positions, layer, 0)
            value = self._pattern(seeds, positions, layer, 1) if self.geometry.value_dim else None
            self.cache.write(layer, slots, last, key, value)
        for slot in slots:
            self.written[slot] = lengths[slot]

    def release(self, slot: int) -> None:
        """The slot is about to be freed: every token must hold what was written."""
        tokens = self.written[slot]
        self.written[slot] = 0
        positions = self._torch.arange(tokens, device=self.device)
        for layer in range(self.geometry.num_layers):
            for is_value, tensor in enumerate(self.cache.view(layer, slot)):
                if tensor is not None:
                    expected = self._pattern(self.seeds[slot], positions, layer, is_value)
                    self._compare(slot, layer, is_value, tensor[:tokens], expected)

    def _pattern(self, seeds: Any, positions: torch.Tensor, layer: int, is_value: int) -> torch.Tensor:
        """What the tokens at these positions hold, shaped as ``view`` shapes them."""
        geometry = self.geometry
        dim = geometry.value_dim if is_value else geometry.head_dim
        starts = (seeds + positions * _PER_POSITION + layer * _PER_LAYER + is_value * _FOR_VALUES) % _STARTS
        return self._windows[dim][starts].view(self.dtype).view(len(positions), geometry.num_kv_heads, dim)

    def _compare(self, slot: int, layer: int, is_value: int, found: torch.Tensor, expected: torch.Tensor) -> None:
        torch = self._torch
        # Bytes, not numbers: every bit counts, and a NaN would equal nothing.
        found_bytes = found.contiguous().view(torch.uint8)
        expected_bytes = expected.view(torch.uint8)
        if found_bytes.shape == expected_bytes.shape and torch.equal(found_bytes, expected_bytes):
            self.verified_bytes += expected_bytes.numel()
            return
        where = f"request {self.requests[slot]} in slot {slot}, layer {layer}, {'V' if is_value else 'K'}"
        if found_bytes.shape != expected_bytes.shape:
            raise VerificationError(f"{where}: the view has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        wrong = (found_bytes != expected_bytes).flatten(1).any(1).nonzero().flatten()
        raise VerificationError(
            f"{where}: {len(wrong)} of {len(expected)} tokens are wrong, the first at {int(wrong[0])}"
        )
