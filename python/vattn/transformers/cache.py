"""VattnCache: the cache that goes into `model.generate(cache=...)`.

What it is: transformers' DynamicCache with every layer that holds full attention replaced by one whose keys and values
live in a vattn.KVCache. Sliding windows, state-space and dummy layers stay as transformers makes them.

What it promises: the tokens of DynamicCache, in memory that follows what is in use. A step that is refused leaves every
layer where it was, those of transformers too. `copy.deepcopy` is a fork with memory of its own; `reset` makes it as
new.

Thread: one at a time, as any transformers cache; different caches are independent.
"""

from __future__ import annotations

import copy
import sys
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch.compiler import is_dynamo_compiling as is_compiling
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

import vattn
from vattn._arguments import to_int
from vattn.sizes import format_size
from vattn.transformers.cache_pool import Member, VattnCachePool, sum_stats
from vattn.transformers.checks import check_options, refuse_a_length_that_cannot_fit, say_what_is_held
from vattn.transformers.layer import VattnLayer
from vattn.transformers.lease import Limits, OwnMemory, Source
from vattn.transformers.memory import CacheMemory
from vattn.transformers.mixed_layers import in_vattn
from vattn.transformers.model_length import model_length, refuse_no_length
from vattn.transformers.other_layers import close_layers, in_every_layer, reset_layers

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
)

#: Layers that hold nothing at all; the releases before 5.23 have none.
_WITHOUT_TOKENS: tuple[Any, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))


class VattnCache(DynamicCache):
    """A key-value cache for one model, on vattn memory.

    `config`: the model's configuration (`model.config`). `max_seq_len`: the most tokens a row may hold; it reserves
    addresses, not memory. None: as many as the model is made for. `max_batch_size`: the most rows, counting every beam
    and every returned sequence. None: no limit; there is room for the first batch then, and a larger one later moves
    what is held to a larger KVCache, which is a copy.

    Options go to vattn.KVCache: `page_size`, `memory_limit`, `layout`, `unmapped_reads`, `guard_tokens`, `scrub`,
    `layers_per_tensor`, `pool`, `lookahead_tokens` (on the CPU 0 unless given: there it hides nothing), `warm_tokens`,
    and `dtype` and `device`, which otherwise follow the model's first keys. Layers of different shapes have a KVCache
    each, and each has the whole `memory_limit`; with a `pool` they share its one.

    For an encoder-decoder model it is an EncoderDecoderCache too, with the decoder's own tokens in vattn memory; inside
    an `EncoderDecoderCache(VattnCache(...), ...)` it is a plain half of one.

    For many conversations of one model see `VattnCache.pool`. In a process forked from this one the cache is closed:
    its methods raise ClosedError there, and touching a tensor of it ends that process with SIGSEGV.

    Raises TypeError for a config, a number or an option of the wrong kind, ValueError for a number under 1, for a model
    that names no length where `max_seq_len` is None, and for `offloading=True`; other options are checked by KVCache
    with the first tokens.
    """

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> VattnCache:
        if cls is VattnCache and getattr(config, "is_encoder_decoder", False) is True:
            from vattn.transformers.encoder_decoder import EncoderDecoderVattnCache

            cls = EncoderDecoderVattnCache
        return super().__new__(cls)

    def __init__(
        self,
        config: PreTrainedConfig,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        *,
        offloading: bool = False,
        _source: Source | None = None,
        **options: Any,
    ) -> None:
        if offloading:
            raise ValueError(
                f"offloading={offloading!r} is not supported: a vattn cache stays at its addresses; "
                "use DynamicCache(offloading=True) to keep the cache on the host"
            )
        if _source is None:
            _source = OwnMemory(_limits(config, max_seq_len, max_batch_size, options))
        self._memory = CacheMemory(_source)
        super().__init__(config=config)
        self.layers = [in_vattn(layer, self._memory) or layer for layer in self.layers]
        others = [layer for layer in self.layers if not isinstance(layer, (VattnLayer, *_WITHOUT_TOKENS))]
        self._memory.has_others = bool(others)
        self._memory.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)
        if not isinstance(_source, Member):  # a pool says it once
            say_what_is_held(config, self.layers_held, len(self.layers), others)
            refuse_no_length(config, self.max_seq_len)

    @property
    def layers_held(self) -> int:
        """How many of the model's layers have their keys and values in vattn memory; `len(cache)` is all of them."""
        return len(self._memory.layers)

    # ------------------------------------------------------------ a step, layer by layer

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add tokens, (rows, heads, n, dim), to a layer and return what it attends over; see VattnLayer.update."""
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, VattnLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if is_compiling():  # what a graph assigns is assigned when all of it has succeeded
            return layer.update(key_states, value_states, *args, **kwargs)
        return self._memory.steps.update(layer, layer_idx, key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As DynamicCache; a forward pass of a model with state-space layers begins here, so room is made for it."""
        if self._memory.has_states and not is_compiling():
            self._memory.steps.expect(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As DynamicCache."""
        self._touch(layer_idx, state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """As DynamicCache."""
        self._touch(layer_idx, state_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_conv_state(self, conv_states: Any, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> torch.Tensor:
        """As DynamicCache."""
        self._touch(layer_idx, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Any, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """As DynamicCache."""
        self._touch(layer_idx, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _touch(self, layer_idx: int, state_idx: int) -> None:
        layer = self.layers[layer_idx]
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not is_compiling():
            self._memory.steps.touch(layer, layer_idx, state_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_seq_len`; of one layer what it holds at most, a window where it has one."""
        own = -1 if layer_idx is None or layer_idx >= len(self.layers) else self.layers[layer_idx].get_max_length()
        return self.max_seq_len if own < 0 else min(own, self.max_seq_len)

    # ------------------------------------------------------------ all layers at once

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens in every layer, or in none where one cannot go back."""
        self._memory.steps.end()
        in_every_layer(self.layers, "crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._memory.reserve_rows(lambda rows: beam_idx)
        in_every_layer(self.layers, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies beside each other; every layer or none."""
        self._memory.reserve_rows(lambda rows: torch.arange(rows).repeat_interleave(repeats))
        in_every_layer(self.layers, "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was, in every layer or in none."""
        self._memory.reserve_rows(lambda rows: indices)
        in_every_layer(self.layers, "batch_select_indices", indices)

    @classmethod
    def pool(
        cls,
        config: PreTrainedConfig,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> VattnCachePool:
        """Memory for many conversations of one model: `pool.new()` gives a VattnCache for each.

        One KVCache is behind all of them (one for each shape of layer), where a VattnCache of its own for every
        conversation is a KVCache each: hundreds of those do not fit in the kernel's mappings on the host. Closed,
        dropped or reset, a conversation's rows go back to the pool and their memory serves the next one; tensors of it
        must not be used after that. `copy.deepcopy` of a conversation is another one in the same pool.

        `max_batch_size`: the most rows that all conversations and their copies may hold together, each of which keeps
        one at least. A row costs addresses, not memory, so leave some to spare: for copies, and because the rows of a
        batch must be neighbours. None: 1,024, or as many as fit in 32 TiB of addresses where a model is made for very
        long sequences. `max_seq_len` and the options are VattnCache's, but `layout` is "NHD" here, and
        `lookahead_tokens` and `warm_tokens` are 0: token-major rows take least of the kernel's mappings and of memory,
        and cost something in decode on the CPU (docs/huggingface.md). `memory_limit` is for the whole pool.

        Any thread may use its own conversation of the pool. Raises as VattnCache does; a full pool is a
        NoFreeSlotError, from `new()` or from the call that needs more rows.
        """
        limits = _limits(config, max_seq_len, max_batch_size, options)
        made = VattnCachePool(cls, config, limits)
        cls(config, _source=OwnMemory(limits)).close()  # what a conversation would refuse is refused now
        return made

    def reset(self) -> None:
        """Forget all tokens, so that the cache is as new.

        Their memory stays mapped for the next tokens, or goes to other members of a pool that need some; `close` gives
        it back to the machine. The next batch may have another size, unless the model has state-space layers:
        transformers keeps theirs.
        """
        self._memory.steps.reset()
        reset_layers(self.layers)

    @property
    def max_seq_len(self) -> int:
        """The most tokens a row may hold."""
        return self._memory.limits.max_seq_len

    @property
    def max_batch_size(self) -> int | None:
        """The most rows it may hold, or its pool in all; None: no limit."""
        return self._memory.limits.max_batch_size

    @property
    def kv_caches(self) -> tuple[vattn.KVCache, ...]:
        """The KVCaches behind it: none before the first tokens and after close, else one for each shape of layer."""
        return tuple(group.cache for group in self._memory.groups if not group.cache.is_closed)

    def stats(self) -> vattn.Stats:
        """KVCache.stats(), summed over `kv_caches`: zeros before the first tokens and after close. Of a pool's
        conversation they are the pool's."""
        return sum_stats(self.kv_caches)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._memory.is_closed

    def close(self) -> None:
        """Give all memory back now; a second call does nothing. Tensors already handed out stay readable.

        The cache is empty then, and no layer takes more tokens, those of transformers neither: vattn.ClosedError.
        """
        self._memory.close()
        close_layers(self.layers)

    @property
    def _is_user_defined(self) -> bool:
        return self._was_given

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # `generate` marks a cache that it is given, when it knows how long the answer may become and has computed
        # nothing: there is no public word between the two in any release of the window.
        self._was_given = value
        refuse_a_length_that_cannot_fit(self.max_seq_len, sys._getframe(1))

    _was_given = False

    def __repr__(self) -> str:
        held = [layer for layer in self._memory.layers if layer.length]
        state = "closed" if self.is_closed else "empty"
        if held and not self.is_closed:
            tokens, rows = max(layer.length for layer in held), max(layer.rows for layer in held)
            used = sum(group.used_bytes for group in self._memory.groups)
            state = f"{tokens} tokens, {rows} rows, {format_size(used)}"
        return (
            f"<{type(self).__name__} {state}, {len(self._memory.layers)} of {len(self.layers)} layers in vattn memory>"
        )

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


def _limits(config: Any, max_seq_len: Any, max_batch_size: Any, options: dict[str, Any]) -> Limits:
    """What the user asked for, checked as far as it can be without the model's keys."""
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config must be a transformers configuration, got {type(config).__name__}; pass model.config")
    for theirs, ours in (("max_cache_len", "max_seq_len"), ("batch_size", "max_batch_size")):
        if theirs in options:
            raise TypeError(
                f"{theirs}={options[theirs]!r} is StaticCache's name for it; VattnCache calls it {ours}, and it may be "
                "left out"
            )
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]}={options[unknown[0]]!r}; VattnCache takes {', '.join(OPTIONS)}")
    check_options(options)
    return Limits(
        model_length(config) if max_seq_len is None else _count("max_seq_len", max_seq_len),
        None if max_batch_size is None else _count("max_batch_size", max_batch_size),
        {name: value for name, value in options.items() if value is not None},
    )


def _count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    number = to_int(value, name)
    if number < 1:
        raise ValueError(f"{name}={number}; it must be at least 1")
    return number
