"""VattnCache for encoder-decoder models.

What it is: what `VattnCache(config, ...)` gives for a T5, a BART or a Whisper. Such models ask their cache for two
halves. The decoder's own tokens grow with every step and live in vattn memory; the encoder's are written once and never
grow, so they stay in a DynamicCache, as transformers does it.

What it promises: it can be passed to `generate` as it is, and as the first argument of an EncoderDecoderCache just as
well.

Thread: one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from vattn.transformers.cache import VattnCache
from vattn.transformers.other_layers import close_layers, reset_layers


class _DecoderCache(VattnCache):
    """A VattnCache for the decoder's own tokens, whatever the configuration says of an encoder."""


class EncoderDecoderVattnCache(VattnCache, EncoderDecoderCache):
    """Both a VattnCache and an EncoderDecoderCache, with its `self_attention_cache` and `cross_attention_cache`."""

    def __init__(
        self,
        config: PreTrainedConfig,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        decoder = _DecoderCache(config, max_seq_len, max_batch_size, **options)
        EncoderDecoderCache.__init__(self, decoder, DynamicCache(config=config))
        # The same layers under both names, so that what asks it for plain tokens, as an outer EncoderDecoderCache does,
        # gets them.
        Cache.__init__(self, layers=decoder.layers)
        self._memory = decoder._memory

    # Both halves: the decoder's first, since it is the one that may refuse.
    crop = EncoderDecoderCache.crop
    # VattnCache's has types, transformers' has none.
    reorder_cache = EncoderDecoderCache.reorder_cache  # type: ignore[assignment]
    batch_repeat_interleave = EncoderDecoderCache.batch_repeat_interleave
    batch_select_indices = EncoderDecoderCache.batch_select_indices

    def __iter__(self) -> Iterator[Any]:
        yield from EncoderDecoderCache.__iter__(self)  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Forget both halves; the next batch may have another size."""
        self._memory.steps.reset()
        reset_layers(self.layers)
        reset_layers(self.cross_attention_cache.layers)
        self.is_updated = dict.fromkeys(self.is_updated, False)

    def close(self) -> None:
        """As VattnCache.close; the encoder's half is emptied too, and takes no more tokens."""
        self.reset()
        super().close()
        close_layers(self.cross_attention_cache.layers)
