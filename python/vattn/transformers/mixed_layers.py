"""Layers that hold full-attention keys and something else beside them.

What it is: the two kinds of transformers layers that keep more than keys and values: `hybrid` layers (Falcon-H1) with
the states of a state-space mixer, and indexed layers (DeepSeek V3.2, GLM-5) with the keys of an indexer that picks
tokens. Their attention keys and values live in vattn memory, as a VattnLayer's; the rest stays as transformers has it.

What it promises: what VattnLayer promises, and of the rest what transformers' own layer does.

Thread: one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling as is_compiling
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from vattn.transformers.layer import VattnLayer

if TYPE_CHECKING:
    from vattn.transformers.memory import CacheMemory


# transformers' class has no types, and the signatures of the two differ: each method is chosen below.
class VattnHybridLayer(LinearAttentionLayer, VattnLayer):  # type: ignore[no-untyped-call,misc,override]
    """Attention in vattn memory and a state-space mixer in one layer."""

    is_compileable = False

    def __init__(self, memory: CacheMemory, number_of_states: int) -> None:
        VattnLayer.__init__(self, memory)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the attention's half with two positional arguments, else of the mixer's, as transformers calls it."""
        if len(args) == 2 and not kwargs:
            VattnLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        """The most tokens it can hold."""
        return VattnLayer.get_max_length(self)

    def crop(self, tokens_to_remove: int) -> None:
        """As VattnLayer.crop; RuntimeError where the mixer cannot go back."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        VattnLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the mixer keeps its tensors, and so the batch size."""
        LinearAttentionLayer.reset(self)
        VattnLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        VattnLayer.reorder_cache(self, beam_idx)

    def twin(self, memory: CacheMemory) -> VattnLayer:
        """The same layer for a copy of the cache, without a group yet."""
        mixer = vars(LinearAttentionLayer(number_of_states=self.number_of_states))
        return self.twin_of(VattnHybridLayer(memory, self.number_of_states), {name: vars(self)[name] for name in mixer})

    offload = prefetch = VattnLayer.offload


# transformers' class has no types.
class VattnIndexedLayer(DynamicIndexedLayer, VattnLayer):  # type: ignore[no-untyped-call]
    """Attention in vattn memory and the keys of an indexer, (rows, tokens, dim), in a layer."""

    def __init__(self, memory: CacheMemory) -> None:
        VattnLayer.__init__(self, memory)
        self._forget_indexer()

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Add indexer keys, (rows, n, dim), and return all of them; a step's refusal takes them away again."""
        if is_compiling():  # what a graph assigns is assigned when all of it has succeeded
            return DynamicIndexedLayer.update_indexer(self, indexer_key_states)
        steps = self.memory.steps
        try:
            step = steps.current
            if step is None or (self, "indexer") in step.undo:
                step = steps.begin(*indexer_key_states.shape[:2])
            held = 0 if self.indexer_keys is None else self.indexer_keys.shape[1]
            positions = self.indexer_position_ids
            got: torch.Tensor = DynamicIndexedLayer.update_indexer(self, indexer_key_states)
            step.undo[self, "indexer"] = lambda: self._restore_indexer(held, positions)
        except BaseException:
            steps.put_back()
            raise
        return got

    def reset(self) -> None:
        """Forget everything; the next tokens may come in another batch size."""
        VattnLayer.reset(self)
        self._forget_indexer()

    def crop(self, tokens_to_remove: int) -> None:
        """As VattnLayer.crop, the indexer's keys too."""
        held = self.length
        VattnLayer.crop(self, tokens_to_remove)
        removed = held - self.length
        if removed and self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, : self.indexer_keys.shape[1] - removed]
        if removed and self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., : self.indexer_position_ids.shape[-1] - removed]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies beside each other."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was."""
        VattnLayer.batch_select_indices(self, indices)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[indices]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[:, indices]

    def twin(self, memory: CacheMemory) -> VattnLayer:
        """The same layer for a copy of the cache, without a group yet."""
        indexer = {name: value for name, value in vars(self).items() if "indexer" in name}
        return self.twin_of(VattnIndexedLayer(memory), indexer)

    offload = prefetch = VattnLayer.offload

    def _restore_indexer(self, held: int, positions: torch.Tensor | None) -> None:
        if held:
            assert self.indexer_keys is not None
            self.indexer_keys = self.indexer_keys[:, :held]
        else:
            self._forget_indexer()
        self.indexer_position_ids = positions

    def _forget_indexer(self) -> None:
        self.indexer_keys: torch.Tensor | None = None
        self.indexer_position_ids: torch.Tensor | None = None
        self.is_indexer_initialized = False


def in_vattn(layer: Any, memory: CacheMemory) -> VattnLayer | None:
    """The layer of vattn that takes the place of transformers' `layer`, or None where there is none."""
    # Exactly these types: subclasses hold windows or states that are theirs to keep.
    if type(layer) is DynamicLayer:
        return VattnLayer(memory)
    if type(layer) is DynamicIndexedLayer:
        return VattnIndexedLayer(memory)
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return VattnHybridLayer(memory, layer.number_of_states)
    return None
