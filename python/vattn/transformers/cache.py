"""VattnCache: the cache that goes into `model.generate(past_key_values=...)`.

What it is: transformers' DynamicCache with every full-attention layer replaced by one that lives in a vattn.KVCache.
Sliding windows, state-space and dummy layers stay as transformers makes them.

What it promises: the tokens of DynamicCache, in memory that follows what is in use. `copy.deepcopy` is a fork with
memory of its own; `reset` makes it as new.

Thread: one at a time, as any transformers cache; different caches are independent.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import vattn
from vattn._arguments import to_int
from vattn.transformers.group import Limits
from vattn.transformers.layer import VattnLayer
from vattn.transformers.memory import CacheMemory

#: KVCache's keyword options that make sense here; shapes, dtype and device come from the model's first keys.
OPTIONS = (
    "device",
    "dtype",
    "layers_per_tensor",
    "layout",
    "page_size",
    "memory_limit",
    "pool",
    "lookahead_tokens",
    "warm_tokens",
    "unmapped_reads",
    "guard_tokens",
    "scrub",
    "dense",
)


class VattnCache(DynamicCache):
    """A key-value cache for one model, on vattn memory.

    `config`: the model's configuration (`model.config`). `max_seq_len`: the most tokens a row may hold; it reserves
    addresses, not memory, so be generous. `max_batch_size`: the most rows, counting every beam and every returned
    sequence.

    Options go to vattn.KVCache: `page_size`, `memory_limit`, `layout`, `unmapped_reads`, `guard_tokens`, `scrub`,
    `layers_per_tensor`, `dense`, `pool`, `lookahead_tokens` (on the CPU 0 unless given: there it hides nothing),
    `warm_tokens`, and `dtype` and `device`, which otherwise follow the model's first keys. Layers of different shapes
    have a KVCache each, and each has the whole `memory_limit`; with a `pool` they share its one.

    For an encoder-decoder model it is an EncoderDecoderCache too, with the decoder's own tokens in vattn memory; inside
    an `EncoderDecoderCache(VattnCache(...), ...)` it is a plain half of one.

    Raises TypeError for a config, a number or an option of the wrong kind, ValueError for a number under 1 and for
    `offloading=True`; other options are checked by KVCache with the first tokens.
    """

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> VattnCache:
        if cls is VattnCache and getattr(config, "is_encoder_decoder", False) is True:
            from vattn.transformers.encoder_decoder import EncoderDecoderVattnCache

            cls = EncoderDecoderVattnCache
        return super().__new__(cls)

    def __init__(
        self,
        config: PreTrainedConfig,
        max_seq_len: int,
        max_batch_size: int = 1,
        *,
        offloading: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"config must be a transformers configuration, got {type(config).__name__}; pass model.config"
            )
        if offloading:
            raise ValueError(
                f"offloading={offloading!r} is not supported: a vattn cache stays at its addresses; "
                "use DynamicCache(offloading=True) to keep the cache on the host"
            )
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise TypeError(
                f"unknown option {unknown[0]}={options[unknown[0]]!r}; VattnCache takes {', '.join(OPTIONS)}"
            )
        self._memory = CacheMemory(
            Limits(
                _count("max_seq_len", max_seq_len),
                _count("max_batch_size", max_batch_size),
                {name: value for name, value in options.items() if value is not None},
            )
        )
        super().__init__(config=config)
        # Exactly DynamicLayer: subclasses hold windows, indexes or states that are theirs to keep.
        self.layers = [VattnLayer(self._memory) if type(layer) is DynamicLayer else layer for layer in self.layers]

    def reset(self) -> None:
        """Forget all tokens and give their memory back.

        The next batch may have another size, unless the model has state-space layers: transformers keeps theirs.
        """
        reset_layers(self.layers)

    @property
    def max_seq_len(self) -> int:
        """The most tokens a row may hold."""
        return self._memory.limits.max_seq_len

    @property
    def max_batch_size(self) -> int:
        """The most rows it may hold."""
        return self._memory.limits.max_batch_size

    @property
    def kv_caches(self) -> tuple[vattn.KVCache, ...]:
        """The KVCaches behind it: none before the first tokens, then one for each shape of layer."""
        return tuple(group.cache for group in self._memory.groups)

    def stats(self) -> vattn.Stats:
        """KVCache.stats(), summed over `kv_caches`: zeros before the first tokens and after close."""
        figures = [cache.stats() for cache in self.kv_caches]
        names = [field.name for field in dataclasses.fields(vattn.Stats)]
        return vattn.Stats(**{name: sum(getattr(one, name) for one in figures) for name in names})

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._memory.is_closed

    def close(self) -> None:
        """Give all memory back now; a second call does nothing. Tensors already handed out stay readable.

        The cache is empty then, and takes no more tokens: vattn.ClosedError.
        """
        self._memory.close()

    def __enter__(self) -> VattnCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VattnCache:
        """A fork: the same tokens in memory of its own. Costs a copy of what is in use, no more."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        copy.deepcopy(self._memory, memo)  # first: it knows the copies of all layers, in whatever order they are met
        for name, value in self.__dict__.items():
            twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "cannot pickle a VattnCache: its memory belongs to this process; "
            "use copy.deepcopy for a copy here, or save clones of the layers' keys and values"
        )


def reset_layers(layers: Iterable[Any]) -> None:
    """Empty every layer. The releases before 5.23 zero a dynamic layer's tensors and keep their length, so they are
    dropped here."""
    for layer in layers:
        layer.reset()
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


def _count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    number = to_int(value, name)
    if number < 1:
        raise ValueError(f"{name}={number}; it must be at least 1")
    return number
