"""KVCache: the memory of an LLM server's attention layers, contiguous per request, mapped on demand.

A thin layer over the native class: it reads the arguments and makes torch tensors. Promise: ``step`` is a transaction;
every error is typed, names the parameter and the value, and leaves lengths, mappings and page counts as they were.
Thread: any method from any thread; driver calls never hold the GIL. In a forked child every method raises
:class:`vattn.ClosedError`.
"""

from __future__ import annotations

import contextlib
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from vattn import _core
from vattn._arguments import (
    is_torch_tensor,
    to_bool,
    to_choice,
    to_device_name,
    to_dtype_name,
    to_int,
    to_ints,
    to_lengths,
    to_optional_int,
    to_optional_size,
    to_size,
)
from vattn._streams import to_handle, to_stream
from vattn._tensors import finisher
from vattn.page_pool import native_pool
from vattn.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from vattn.page_pool import PagePool

    Views = tuple[torch.Tensor, torch.Tensor | None]


class KVCache:
    """Keys and values of ``num_layers`` attention layers for up to ``max_batch_size`` requests.

    Args:
        num_layers: layers that have keys and values.
        num_kv_heads: heads of keys and values a layer.
        head_dim: elements of a key.
        max_batch_size: slots, each holding one request.
        max_seq_len: tokens a slot can grow to. Addresses are reserved for it; they cost nothing.
        dtype: float16, bfloat16, float32, a float8 type, int8 or uint8.
        device: ``"cpu"``, ``"cuda[:i]"`` or ``"meta"`` (accounting only: any size, no memory).
        v_head_dim: elements of a value; None: as ``head_dim``; 0: keys only (MLA latents), and every V is None.
        layers_per_tensor: layers that share one tensor, so that a page holds fewer tokens of more layers. Divides
            ``num_layers``.
        layout: ``"NHD"`` (token-major), ``"HND"`` (head-major), or None: HND on the host where its rows stay within
            half of the kernel's mappings and ``layers_per_tensor`` is 1, else NHD. Changes strides, never shapes.
        page_size: bytes, or text such as ``"2MiB"``; None: 64 KiB on the host, 2 MiB on cuda and meta.
        memory_limit: bytes, or text such as ``"40GiB"``, at least one page in every tensor; None: 90 % of what is free
            now, and no limit on meta.
        pool: a :class:`vattn.PagePool` of the same device, to share one budget with others. It sets the page size and
            the limit, so neither can be given here.
        lookahead_tokens: how far a thread of the cache's own keeps memory mapped ahead of every slot in use, so that
            ``step`` finds it there; None: a page, 64 tokens at least, and 0 on meta; 0: no thread.
        warm_tokens: how far that thread keeps one free slot mapped for the next request; None: a page in every tensor;
            0: not at all.
        unmapped_reads: what reading tokens that were never committed does: ``"zeros"`` (the host's default, and
            possible only there) or ``"fault"``.
        guard_tokens: tokens past every length that are kept committed and zeroed, for kernels that load whole tiles.
        scrub: zero a page before another request can see it.

    Raises:
        TypeError, ValueError, OverflowError: a bad argument.
        OutOfMemoryError: the addresses are not to be had.
        DriverError: the device cannot be used; the message says why.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype | str,
        device: torch.device | str,
        v_head_dim: int | None = None,
        layers_per_tensor: int = 1,
        layout: str | None = None,
        page_size: int | str | None = None,
        memory_limit: int | str | None = None,
        pool: PagePool | None = None,
        lookahead_tokens: int | None = None,
        warm_tokens: int | None = None,
        unmapped_reads: str | None = None,
        guard_tokens: int = 0,
        scrub: bool = False,
    ) -> None:
        self._dtype_name = to_dtype_name(dtype)
        self._device_name = to_device_name(device)
        self._max_seq_len = to_int(max_seq_len, "max_seq_len")
        self._max_batch_size = to_int(max_batch_size, "max_batch_size")
        self._num_layers = to_int(num_layers, "num_layers")
        self._num_kv_heads = to_int(num_kv_heads, "num_kv_heads")
        self._head_dim = to_int(head_dim, "head_dim")
        v_dim = to_optional_int(v_head_dim, "v_head_dim")
        self._v_head_dim = self._head_dim if v_dim is None else v_dim
        self._guard_tokens = to_int(guard_tokens, "guard_tokens")
        self._pool = pool
        self._native = _core.KVCache(
            self._num_layers,
            self._num_kv_heads,
            self._head_dim,
            max_batch_size=self._max_batch_size,
            max_seq_len=self._max_seq_len,
            dtype=self._dtype_name,
            device=self._device_name,
            v_head_dim=v_dim,
            layers_per_tensor=to_int(layers_per_tensor, "layers_per_tensor"),
            layout=to_choice(layout, "layout", ("NHD", "HND")),
            page_size=to_optional_size(page_size, "page_size"),
            memory_limit=to_optional_size(memory_limit, "memory_limit"),
            pool=native_pool(pool, self._device_name),
            lookahead_tokens=to_optional_int(lookahead_tokens, "lookahead_tokens"),
            warm_tokens=to_optional_int(warm_tokens, "warm_tokens"),
            unmapped_reads=to_choice(unmapped_reads, "unmapped_reads", ("fault", "zeros")),
            guard_tokens=self._guard_tokens,
            scrub=to_bool(scrub, "scrub"),
        )
        self._page_size = self._native.page_size()
        self._tokens_per_page = self._native.tokens_per_page()
        self._layout = self._native.layout()
        self._lookahead_tokens = self._native.lookahead_tokens()
        self._warm_tokens = self._native.warm_tokens()
        # When the cache is dropped, and at interpreter exit, while its thread can still be waited for. The native
        # destructor would call the driver with the GIL held.
        weakref.finalize(self, _close_quietly, self._native)
        self._finish: Callable[[Any], Views] = finisher(self._dtype_name, self._device_name)

    # Slots. A stream is a torch.cuda.Stream, an object with __cuda_stream__, or the handle as an int; None: torch's
    # current stream of the cache's device. It matters on cuda only.

    def alloc(self, expected_len: int | None = None, *, stream: Any = None) -> int:
        """Takes a free slot: of those that kept memory, the smallest with room for ``expected_len`` tokens, else the
        largest; of those that have none, the lowest.

        Args:
            expected_len: tokens that the request will have; None: as many as possible.
            stream: whose work comes next. It is made to wait for what still uses the slot's memory.

        Raises:
            NoFreeSlotError: all are in use.
            ValueError: ``expected_len`` is negative or past ``max_seq_len``.
        """
        return self._native.alloc(
            to_optional_int(expected_len, "expected_len"), stream=to_stream(stream, self._device_name)
        )

    def alloc_block(self, n: int, *, stream: Any = None) -> list[int]:
        """Takes ``n`` neighbouring slots, ascending, for kernels that want a dense batch; ``stream`` as for
        :meth:`alloc`.

        NoFreeSlotError when there are none.
        """
        return self._native.alloc_block(to_int(n, "n"), stream=to_stream(stream, self._device_name))

    def free(self, slot: int, *, stream: Any = None) -> None:
        """Forgets a slot. Its pages stay mapped, for the next request or for whoever needs them.

        They are taken away only once the work on ``stream``, and on the streams recorded, has finished. Where there is
        no stream to go by, this waits for the device instead.

        Raises:
            IndexError: no such slot.
            ValueError: the slot is not in use.
            Error: the stream is being captured into a graph.
        """
        self._native.free(to_int(slot, "slot"), stream=to_stream(stream, self._device_name))

    def record_stream(self, stream: Any) -> None:
        """Another stream uses this cache too: what is given up from now on waits for its work as well."""
        self._native.record_stream(to_handle(stream, self._device_name))

    def slots(self) -> list[int]:
        """The slots in use, ascending."""
        return self._native.slots()

    def __len__(self) -> int:
        """How many slots are in use."""
        return self._native.active_slots()

    def __bool__(self) -> bool:
        """Always true: a cache is a cache, even with no slot in use."""
        return True

    # Lengths.

    def step(self, lengths: Mapping[int, int] | Sequence[int] | torch.Tensor) -> None:
        """Makes sure that slots have memory for that many tokens: all of them, or nothing changes.

        Args:
            lengths: ``{slot: tokens}`` of slots in use, or one length a slot (``max_batch_size`` of them, 0: leave
                alone), as a list, a tuple, or an array or tensor of integers. int64 arrays cost least. A length at or
                under the slot's own leaves the slot alone: ``step`` never shrinks.

        Raises:
            OutOfMemoryError: not all the pages are to be had; ``needed_bytes`` says how much was missing.
            ValueError, IndexError, TypeError: a bad slot or length.
            DriverError: a driver call failed, and everything was undone.
            Error: it would grow while torch's current stream, or one recorded, is being captured into a graph.
        """
        if not self._native.step(lengths):
            stream = to_stream(None, self._device_name)
            if not self._native.step_on(lengths, stream):
                self._native.step_on(to_lengths(lengths), stream)

    def fits(self, lengths: Mapping[int, int] | Sequence[int] | torch.Tensor) -> bool:
        """Whether such a :meth:`step` would have memory now. Takes nothing; bad arguments raise as there."""
        answer = self._native.fits(lengths)
        if answer is None:
            answer = self._native.fits(to_lengths(lengths))
        return bool(answer)

    def truncate(self, slot: int, n: int, *, stream: Any = None) -> None:
        """Forgets the tokens from ``n`` on; whole pages above them can be taken by others, as after :meth:`free`.

        Raises:
            ValueError: ``n`` is negative or past the length, or the slot is not in use.
            Error: the stream is being captured into a graph.
        """
        self._native.truncate(to_int(slot, "slot"), to_int(n, "n"), stream=to_stream(stream, self._device_name))

    def seq_len(self, slot: int) -> int:
        """Tokens in use."""
        return self._native.seq_len(to_int(slot, "slot"))

    def committed_len(self, slot: int) -> int:
        """Tokens that have memory now, look-ahead included; neither the guard, nor what was truncated."""
        return self._native.committed_len(to_int(slot, "slot"))

    # Tensors.

    def view(self, layer: int, slot: int) -> Views:
        """Keys and values of one slot, ``(seq_len, num_kv_heads, head_dim)``: the tokens in use, sharing memory.

        The tensors keep their addresses, and their contents after :meth:`close`, for as long as they live. They are
        not inherited: touching one in a forked child is a segmentation fault there.
        """
        return self._finish(self._native.view(to_int(layer, "layer"), to_int(slot, "slot")))

    def batch(self, layer: int, slots: Sequence[int], length: int) -> Views:
        """Several slots as one strided batch, ``(n, length, num_kv_heads, head_dim)``.

        ValueError unless the slots ascend in equal steps, are in use, and have ``length`` tokens committed (or read as
        zeros).
        """
        return self._finish(
            self._native.batch(to_int(layer, "layer"), to_ints(slots, "slots"), to_int(length, "length"))
        )

    def layer(self, layer: int) -> Views:
        """The whole reservation of a layer: ``(max_batch_size, max_seq_len, num_kv_heads, head_dim)``.

        For kernels that take lengths. Not all of it has memory: do not print, copy or save it: that touches every
        token. Writing where no token is (``cache.layer(0)[0].zero_()``) ends the process with a segmentation fault;
        reading there gives zeros, or under ``unmapped_reads="fault"`` ends it too.
        """
        return self._finish(self._native.layer(to_int(layer, "layer")))

    def write(
        self,
        layer: int,
        slots: Sequence[int],
        positions: Sequence[int],
        k: torch.Tensor,
        v: torch.Tensor | None = None,
    ) -> None:
        """Writes one new token an entry: ``k[i]`` and ``v[i]`` to ``positions[i]`` of ``slots[i]``.

        Args:
            k: ``(n, num_kv_heads, head_dim)``, of the cache's dtype, on its device.
            v: ``(n, num_kv_heads, v_head_dim)``; None in a cache of keys only.

        Raises:
            IndexError: a position at or past its slot's length.
            ValueError, TypeError: shapes, dtypes or devices that do not fit.
        """
        slot_list = to_ints(slots, "slots")
        position_list = to_ints(positions, "positions")
        if len(slot_list) != len(position_list):
            raise ValueError(
                f"positions has {len(position_list)} entries, slots has {len(slot_list)}: one position a slot"
            )
        for slot, position in zip(slot_list, position_list, strict=True):
            length = self._native.seq_len(slot)
            if not 0 <= position < length:
                raise IndexError(f"positions: {position} of slot {slot} is outside its length, {length}: step it first")
        k_layer, v_layer = self.layer(layer)
        self._check_new("k", k, len(slot_list), self._head_dim, k_layer)
        if v_layer is not None:
            self._check_new("v", v, len(slot_list), self._v_head_dim, v_layer)
        elif v is not None:
            raise ValueError("v must be None in a cache of keys only (v_head_dim=0)")
        if self._device_name == "meta" or not slot_list:
            return
        import torch

        index = torch.tensor([slot_list, position_list], device=k_layer.device)
        with torch.no_grad():
            self._put(k_layer, index, k)
            if v_layer is not None and v is not None:
                self._put(v_layer, index, v)

    @staticmethod
    def _put(target: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> None:
        import torch

        if new.dtype.itemsize == 1:  # the 8-bit float types cannot be indexed; bytes can
            target, new = target.view(torch.uint8), new.view(torch.uint8)
        target[index[0], index[1]] = new

    def _check_new(self, name: str, value: Any, count: int, dim: int, target: torch.Tensor) -> None:
        if not is_torch_tensor(value):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
        shape = (count, self._num_kv_heads, dim)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; (slots, num_kv_heads, dim) is {shape}")
        if value.dtype != target.dtype:
            raise ValueError(f"{name} has dtype {value.dtype}; the cache holds {target.dtype}: convert it first")
        if "strided" not in str(value.layout):
            raise ValueError(f"{name} is {value.layout}; only dense tensors can be written: call to_dense() first")
        if value.device != target.device:
            raise ValueError(f"{name} is on {value.device}; the cache is on {target.device}: move it first")

    # Budget and state.

    @property
    def memory_limit(self) -> int:
        """Bytes of physical memory the cache may hold. Set it at any time, in bytes or as text.

        Lowered, it holds at once for growth and gives up what is not in use: now, or as soon as the work that still
        uses it has finished. Active slots keep their pages. ValueError below one page group, and for a member of a
        pool: set the pool's.
        """
        return self._native.memory_limit()

    @memory_limit.setter
    def memory_limit(self, value: int | str) -> None:
        self._native.set_memory_limit(to_size(value, "memory_limit", "cache"))

    def stats(self) -> Stats:
        """A snapshot of bytes and counts."""
        return Stats(*self._native.stats())

    def settle(self) -> None:
        """Waits until the look-ahead thread has mapped what it can for now; at once where there is none. For tests and
        measurements: ``step`` waits for what it needs by itself."""
        self._native.settle()

    def close(self) -> None:
        """Gives everything back but what living tensors hold. A second call does nothing; every other method then
        raises.

        Error: the driver would not take everything back; the message says what, and the cache is closed all the same.
        """
        self._native.close()

    @property
    def is_closed(self) -> bool:
        return self._native.is_closed()

    @property
    def name(self) -> str:
        """What ``pool.stats()`` and messages call it: the kind, and the order of joining the pool."""
        return self._native.name()

    @property
    def pool(self) -> PagePool | None:
        """The pool it was given, or None."""
        return self._pool

    @property
    def max_batch_size(self) -> int:
        return self._max_batch_size

    @property
    def max_seq_len(self) -> int:
        return self._max_seq_len

    @property
    def num_layers(self) -> int:
        return self._num_layers

    @property
    def num_kv_heads(self) -> int:
        return self._num_kv_heads

    @property
    def head_dim(self) -> int:
        return self._head_dim

    @property
    def v_head_dim(self) -> int:
        return self._v_head_dim

    @property
    def page_size(self) -> int:
        """Bytes."""
        return self._page_size

    @property
    def lookahead_tokens(self) -> int:
        """How far memory is mapped ahead of every slot in use; 0: no thread does."""
        return self._lookahead_tokens

    @property
    def warm_tokens(self) -> int:
        """How far one free slot is kept mapped for the next request."""
        return self._warm_tokens

    @property
    def guard_tokens(self) -> int:
        """Tokens past every length that are kept committed, for kernels that load whole tiles."""
        return self._guard_tokens

    @property
    def tokens_per_page(self) -> int:
        """Whole tokens that a page holds in one tensor; 0 where a token spans pages."""
        return self._tokens_per_page

    @property
    def layout(self) -> str:
        """``"NHD"`` or ``"HND"``."""
        return self._layout

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self._device_name)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self._dtype_name)
        return dtype

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"{len(self)} of {self._max_batch_size} slots in use"
        return (
            f"<vattn.KVCache {self._num_layers} layers x {self._num_kv_heads} heads x {self._head_dim}, "
            f"{self._dtype_name}, {self._layout}, {self._device_name}, {state}>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a KVCache cannot be pickled or copied: it owns mapped memory; copy the tensors of its views instead"
        )


def _close_quietly(native: _core.KVCache) -> None:
    with contextlib.suppress(Exception):  # in a forked child, or what the driver would not take
        native.close()
