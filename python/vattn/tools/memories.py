"""The two memories vattn is compared with, as arithmetic: paging with blocks of 16 tokens (or another number), and one
fixed slot a request.

Both get the same budget as vattn and are run by the same scheduler. Neither pays for anything but its own bytes: no
block tables, no fragmentation between requests. Thread: one at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from vattn.tools.geometry import Geometry
from vattn.tools.pages import PAGED_BLOCK_TOKENS


class PagedMemory:
    """PagedAttention's accounting: every request takes whole blocks of ``block_tokens``, from anywhere."""

    def __init__(
        self,
        geometry: Geometry,
        budget: int,
        max_batch: int,
        max_seq_len: int,
        block_tokens: int = PAGED_BLOCK_TOKENS,
    ) -> None:
        self.block_tokens = block_tokens
        self.token_bytes = geometry.token_bytes
        self.blocks = self.free_blocks = budget // (block_tokens * self.token_bytes)
        self.longest = min(max_seq_len, self.blocks * block_tokens)
        self.free_slots = list(range(max_batch - 1, -1, -1))
        self.tokens = array("q", bytes(8 * max_batch))  # in use, by slot
        self.room = array("q", bytes(8 * max_batch))  # tokens the slot's blocks can hold
        self.total_tokens = 0
        self.asked_bytes = 0

    def admit(self, request: int, tokens: int) -> int:
        blocks = -(-tokens // self.block_tokens)
        if blocks > self.free_blocks or not self.free_slots:
            return -1
        slot = self.free_slots.pop()
        self.free_blocks -= blocks
        self.asked_bytes += blocks * self.block_tokens * self.token_bytes
        self.tokens[slot], self.room[slot] = tokens, blocks * self.block_tokens
        self.total_tokens += tokens
        return slot

    def grow(self, lengths: array[int], active: Sequence[int]) -> bool:
        room = self.room
        full = [slot for slot in active if lengths[slot] > room[slot]]  # a token each, so a block each
        if len(full) > self.free_blocks:
            return False
        self.free_blocks -= len(full)
        self.asked_bytes += len(full) * self.block_tokens * self.token_bytes
        for slot in full:
            room[slot] += self.block_tokens
        tokens = self.tokens
        for slot in active:
            self.total_tokens += lengths[slot] - tokens[slot]
            tokens[slot] = lengths[slot]
        return True

    def release(self, slot: int) -> None:
        self.free_blocks += self.room[slot] // self.block_tokens
        self.total_tokens -= self.tokens[slot]
        self.tokens[slot] = self.room[slot] = 0
        self.free_slots.append(slot)

    def usage(self) -> tuple[int, int, int]:
        taken = (self.blocks - self.free_blocks) * self.block_tokens
        return self.total_tokens * self.token_bytes, taken * self.token_bytes, 0


class StaticMemory:
    """A static cache: slots of ``max_seq_len`` tokens, each held whole for as long as its request runs."""

    def __init__(self, geometry: Geometry, budget: int, max_batch: int, max_seq_len: int) -> None:
        self.token_bytes = geometry.token_bytes
        self.slot_bytes = max_seq_len * self.token_bytes
        self.slots = min(max_batch, budget // self.slot_bytes)
        self.longest = max_seq_len if self.slots else -1  # -1: not even a request without tokens
        self.free_slots = list(range(self.slots - 1, -1, -1))
        self.tokens = array("q", bytes(8 * max_batch))
        self.total_tokens = 0
        self.asked_bytes = 0

    def admit(self, request: int, tokens: int) -> int:
        if not self.free_slots:
            return -1
        slot = self.free_slots.pop()
        self.asked_bytes += self.slot_bytes
        self.tokens[slot] = tokens
        self.total_tokens += tokens
        return slot

    def grow(self, lengths: array[int], active: Sequence[int]) -> bool:
        tokens = self.tokens
        for slot in active:
            self.total_tokens += lengths[slot] - tokens[slot]
            tokens[slot] = lengths[slot]
        return True

    def release(self, slot: int) -> None:
        self.total_tokens -= self.tokens[slot]
        self.tokens[slot] = 0
        self.free_slots.append(slot)

    def usage(self) -> tuple[int, int, int]:
        taken = self.slots - len(self.free_slots)
        return self.total_tokens * self.token_bytes, taken * self.slot_bytes, 0
