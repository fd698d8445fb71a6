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
from typing import TYPE_CHECKING, Any, Generic, NoReturn

from vattn import _core
from vattn._arguments import (
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
from vattn._tensors import KV, ValueT, finisher
from vattn._torch import require
from vattn._writing import write_tokens
from vattn.errors import Error
from vattn.page_pool import native_pool
from vattn.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal, overload

    import torch

    from vattn.page_pool import PagePool
    from vattn.rows import Rows


class KVCache(Generic[ValueT]):
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
            ``num_layers``. The token stride of a view is then ``layers_per_tensor * num_kv_heads * head_dim``: a kernel
            that needs dense rows wants 1. None: 1 on the host and with ``layout="HND"``; on cuda and meta the smallest
            divisor with which a page holds at most 64 tokens of every tensor, else ``num_layers``.
        layout: ``"NHD"`` (token-major), ``"HND"`` (head-major, one layer a tensor), or None: HND on the host where its
            rows stay within half of the kernel's mappings and ``layers_per_tensor`` is 1, else NHD. Changes strides,
            never shapes.
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
        dense: one layer a tensor whatever the device, as ``layers_per_tensor=1``: for kernels that take no stride
            between tokens but ``num_kv_heads * head_dim``.

    Raises:
        TypeError, ValueError, OverflowError: a bad argument.
        OutOfMemoryError: the addresses are not to be had.
        DriverError: the device cannot be used; the message says why.

    For type checkers a cache made with ``v_head_dim=0`` is a ``KVCache[None]``, whose every V is None, and any other a
    ``KVCache[torch.Tensor]``, which is what ``KVCache`` alone means.
    """

    if TYPE_CHECKING:

        @overload
        def __init__(
            self: KVCache[None],
            num_layers: int,
            num_kv_heads: int,
            head_dim: int,
            *,
            max_batch_size: int,
            max_seq_len: int,
            dtype: torch.dtype | str,
            device: torch.device | str,
            v_head_dim: Literal[0],
            layers_per_tensor: int | None = ...,
            layout: str | None = ...,
            page_size: int | str | None = ...,
            memory_limit: int | str | None = ...,
            pool: PagePool | None = ...,
            lookahead_tokens: int | None = ...,
            warm_tokens: int | None = ...,
            unmapped_reads: str | None = ...,
            guard_tokens: int = ...,
            scrub: bool = ...,
            dense: bool = ...,
        ) -> None: ...
        @overload
        def __init__(
            self: KVCache[torch.Tensor],
            num_layers: int,
            num_kv_heads: int,
            head_dim: int,
            *,
            max_batch_size: int,
            max_seq_len: int,
            dtype: torch.dtype | str,
            device: torch.device | str,
            v_head_dim: int | None = ...,
            layers_per_tensor: int | None = ...,
            layout: str | None = ...,
            page_size: int | str | None = ...,
            memory_limit: int | str | None = ...,
            pool: PagePool | None = ...,
            lookahead_tokens: int | None = ...,
            warm_tokens: int | None = ...,
            unmapped_reads: str | None = ...,
            guard_tokens: int = ...,
            scrub: bool = ...,
            dense: bool = ...,
        ) -> None: ...

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
        layers_per_tensor: int | None = None,
        layout: str | None = None,
        page_size: int | str | None = None,
        memory_limit: int | str | None = None,
        pool: PagePool | None = None,
        lookahead_tokens: int | None = None,
        warm_tokens: int | None = None,
        unmapped_reads: str | None = None,
        guard_tokens: int = 0,
        scrub: bool = False,
        dense: bool = False,
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
            layers_per_tensor=to_optional_int(layers_per_tensor, "layers_per_tensor"),
            layout=to_choice(layout, "layout", ("NHD", "HND")),
            page_size=to_optional_size(page_size, "page_size"),
            memory_limit=to_optional_size(memory_limit, "memory_limit"),
            pool=native_pool(pool, self._device_name),
            lookahead_tokens=to_optional_int(lookahead_tokens, "lookahead_tokens"),
            warm_tokens=to_optional_int(warm_tokens, "warm_tokens"),
            unmapped_reads=to_choice(unmapped_reads, "unmapped_reads", ("fault", "zeros")),
            guard_tokens=self._guard_tokens,
            scrub=to_bool(scrub, "scrub"),
            dense=to_bool(dense, "dense"),
        )
        self._page_size = self._native.page_size()
        self._tokens_per_page = self._native.tokens_per_page()
        self._layers_per_tensor = self._native.layers_per_tensor()
        self._layout = self._native.layout()
        self._lookahead_tokens = self._native.lookahead_tokens()
        self._warm_tokens = self._native.warm_tokens()
        # When the cache is dropped, and at interpreter exit, while its thread can still be waited for. The native
        # destructor would call the driver with the GIL held.
        weakref.finalize(self, _close_quietly, self._native)
        self._finish = finisher(self._dtype_name, self._device_name)
        self._kind: tuple[torch.dtype, torch.layout, torch.device] | None = None
        # Rows whose index tensors a step refreshes: replaced as a whole, so that any thread may walk it.
        self._followers: tuple[weakref.ref[Rows[ValueT]], ...] = ()

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

    def alloc_batch(self, n: int, *, stream: Any = None) -> list[int]:
        """Takes ``n`` neighbouring slots, ascending, for kernels that want a dense batch; ``stream`` as for
        :meth:`alloc`.

        NoFreeSlotError when there are none.
        """
        return self._native.alloc_batch(to_int(n, "n"), stream=to_stream(stream, self._device_name))

    def alloc_block(self, n: int, *, stream: Any = None) -> list[int]:
        """The first name of :meth:`alloc_batch`."""
        return self.alloc_batch(n, stream=stream)

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

    def rows(self, slots: Sequence[int] | torch.Tensor) -> Rows[ValueT]:
        """These slots, validated once, for the loop of a server: see :class:`vattn.Rows`.

        Args:
            slots: in use, each once, at least one.

        Raises:
            ValueError, IndexError: a slot that is not in use, or named twice; none at all.
        """
        from vattn.rows import Rows

        native = self._native.rows(slots)
        if native is None:
            native = self._native.rows(to_ints(slots, "slots"))
        return Rows(self, native)

    def step(self, lengths: Mapping[int, int] | Sequence[int] | torch.Tensor) -> None:
        """Makes sure that slots have memory for that many tokens: all of them, or nothing changes.

        Args:
            lengths: ``{slot: tokens}`` of slots in use, or one length a slot (``max_batch_size`` of them, 0: leave
                alone), as a list, a tuple, or an array or tensor of integers. Arrays of int64 and int32 cost least. A
                length at or under the slot's own leaves the slot alone: ``step`` never shrinks.

        Raises:
            OutOfMemoryError: not all the pages are to be had; ``needed_bytes`` says how much was missing, and
                ``waiting_can_help`` whether others hold it.
            ValueError, IndexError, TypeError: a bad slot or length.
            DriverError: a driver call failed, and everything was undone.
            Error: it would grow while torch's current stream, or one recorded, is being captured into a graph.
        """
        if self._followers:
            self._check_not_capturing("step")
        if not self._native.step(lengths):
            stream = to_stream(None, self._device_name)
            if not self._native.step_on(lengths, stream):
                self._native.step_on(to_lengths(lengths), stream)
        if self._followers:
            self._lead()

    def _add_follower(self, rows: Rows[ValueT]) -> None:
        if all(one() is not rows for one in self._followers):
            self._followers = (*(one for one in self._followers if one() is not None), weakref.ref(rows))

    def _lead(self) -> None:
        """Lengths changed: the rows that have index tensors refresh them, on the current stream."""
        for one in self._followers:
            rows = one()
            if rows is not None:
                rows._follow()

    def _check_not_capturing(self, call: str) -> None:
        """A copy from the host to the index tensors of rows cannot be part of a graph: it would replay old numbers."""
        rows = next((rows for rows in (one() for one in self._followers) if rows is not None), None)
        if rows is not None and rows._is_capturing():
            raise Error(
                f"{call}: torch's current stream is being captured into a graph, and {call} refreshes the index "
                f"tensors of rows: {call} before the capture, and before each replay"
            )

    def fits(
        self,
        lengths: Mapping[int, int] | Sequence[int] | torch.Tensor,
        new: Sequence[int] | torch.Tensor = (),
    ) -> bool:
        """Whether such a :meth:`step` would have memory now. Takes nothing; bad arguments raise as there.

        Args:
            lengths: as for :meth:`step`; ``{}`` where no slot grows.
            new: the lengths of requests to come, which need a free slot each: with fewer free slots the answer is
                False. ``cache.fits({}, new=[300, 20])`` asks before both are admitted.
        """
        answer = self._native.fits(lengths, new)
        if answer is None:
            answer = self._native.fits(to_lengths(lengths), to_ints(new, "new"))
        return bool(answer)

    def truncate(self, slot: int, n: int, *, stream: Any = None) -> None:
        """Forgets the tokens from ``n`` on; whole pages above them can be taken by others, as after :meth:`free`.

        Raises:
            ValueError: ``n`` is negative or past the length, or the slot is not in use.
            Error: the stream is being captured into a graph.
        """
        if self._followers:
            self._check_not_capturing("truncate")
        self._native.truncate(to_int(slot, "slot"), to_int(n, "n"), stream=to_stream(stream, self._device_name))
        if self._followers:
            self._lead()

    def seq_len(self, slot: int) -> int:
        """Tokens in use."""
        return self._native.seq_len(to_int(slot, "slot"))

    def committed_len(self, slot: int) -> int:
        """Tokens that have memory now, look-ahead included; neither the guard, nor what was truncated."""
        return self._native.committed_len(to_int(slot, "slot"))

    def slot_bytes(self, slot: int) -> int:
        """Bytes of memory that are this slot's alone: what ``stats().available_bytes`` gains when it is freed."""
        return self._native.slot_bytes(to_int(slot, "slot"))

    # Tensors.

    def view(self, layer: int, slot: int) -> KV[ValueT]:
        """Keys and values of one slot, ``(seq_len, num_kv_heads, head_dim)``: the tokens in use, sharing memory.

        The pair has the fields ``k`` and ``v`` and unpacks as a tuple. The tensors keep their addresses, and their
        contents after :meth:`close`, for as long as they live. They are not inherited: touching one in a forked child
        is a segmentation fault there.

        Pickling, ``torch.save``, ``deepcopy`` and sending one to another process (queues, DataLoader) take a copy of
        what it shows, made when it is pickled, and leave it in the cache. ``share_memory_()`` does not: torch then
        gives the tensor other memory, the whole span of it, which for a head-major view includes the gaps between
        heads, and it shows the cache no more. Call ``.clone()`` first, and share that.

        ModuleNotFoundError: torch is not installed.
        """
        if type(layer) is not int or type(slot) is not int or layer.bit_length() > 63 or slot.bit_length() > 63:
            layer, slot = to_int(layer, "layer"), to_int(slot, "slot")
        views: KV[ValueT] = self._native.view(layer, slot, KV)
        return views if self._finish is None else self._finished(views)

    def batch(self, layer: int, slots: Sequence[int], length: int) -> KV[ValueT]:
        """Several slots as one strided batch, ``(n, length, num_kv_heads, head_dim)``.

        ValueError unless the slots ascend in equal steps, are in use, and have ``length`` tokens committed (or read as
        zeros). Copies, pickles and ``share_memory_()``: as for :meth:`view`.
        """
        return self._finished(
            self._native.batch(to_int(layer, "layer"), to_ints(slots, "slots"), to_int(length, "length"), KV)
        )

    def layer(self, layer: int) -> KV[ValueT]:
        """The whole reservation of a layer: ``(max_batch_size, max_seq_len, num_kv_heads, head_dim)``.

        For kernels that take lengths. Not all of it has memory: do not print, copy, save, send or
        ``share_memory_()`` it, since that touches every token. Writing where no token is
        (``cache.layer(0).k[0].zero_()``) ends the process with a segmentation fault; reading there gives zeros, or
        under ``unmapped_reads="fault"`` ends it too. Take a part of it, ``k[slot, :n]``: what such a part shows is what
        is pickled and sent, as for :meth:`view`.
        """
        return self._finished(self._native.layer(to_int(layer, "layer"), KV))

    def _tensor_kind(self) -> tuple[torch.dtype, torch.layout, torch.device]:
        """What its tensors are, found once: those of a fake driver are not where the device's name says."""
        if self._kind is None:
            torch = require("a tensor over vattn's memory")
            self._kind = self.dtype, torch.strided, self.layer(0).k.device
        return self._kind

    def _finished(self, views: Any) -> KV[ValueT]:
        """What the native part handed out, as the tensors that a user gets."""
        pair: KV[Any] = views
        if self._finish is not None:
            pair = KV(self._finish(pair.k), None if pair.v is None else self._finish(pair.v))
        return pair

    def write(
        self,
        layer: int,
        slots: Sequence[int] | torch.Tensor,
        positions: Sequence[int] | torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
    ) -> None:
        """Writes new tokens of several slots: one token an entry, or a span of several.

        Args:
            slots, positions: entry i writes to ``positions[i]`` of ``slots[i]``, and a span to that and the following
                positions. Lists, tuples, and arrays of int64 or int32 cost least. On cuda they are copied to the device
                in every call, which waits for the current stream, and which a capture into a graph refuses:
                ``rows(slots)`` keeps them there.
            k: ``(n, num_kv_heads, head_dim)``, one token an entry, or ``(n, tokens, num_kv_heads, head_dim)``, a span
                an entry; of the cache's dtype, on its device.
            v: alike, with ``v_head_dim``; None in a cache of keys only.

        Raises:
            IndexError: a position at or past its slot's length, or a span that reaches past it. Nothing is written.
            ValueError, TypeError: shapes, dtypes or devices that do not fit.
        """
        write_tokens(self, to_int(layer, "layer"), slots, positions, k, v)

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
        """Whole tokens that a page holds in one tensor, the smallest over all tensors; 0 where a token spans pages."""
        return self._tokens_per_page

    @property
    def layers_per_tensor(self) -> int:
        """Layers that share a tensor, and so a page; 1: rows are dense."""
        return self._layers_per_tensor

    @property
    def layout(self) -> str:
        """``"NHD"`` or ``"HND"``."""
        return self._layout

    @property
    def device(self) -> torch.device:
        device: torch.device = require("KVCache.device").device(self._device_name)
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(require("KVCache.dtype"), self._dtype_name)
        return dtype

    def __enter__(self) -> KVCache[ValueT]:
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
