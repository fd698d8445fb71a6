"""One attention layer of a VattnCache.

What it is: what transformers calls a cache layer. `update` copies the new keys and values straight to their place and
returns views of exactly the tokens in use; nothing that is already there is touched, moved or concatenated.

What it promises: the tensors of one layer stay at the same addresses while tokens are added; the length is a plain int,
so that transformers builds no mask where none is needed; a call that raises leaves the layer as it was.

Thread: one at a time.
"""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.compiler import is_dynamo_compiling as is_compiling
from transformers.cache_utils import DynamicLayer

from vattn.transformers.assignment import Half, apart, assign
from vattn.transformers.compiled import extend, fill, named
from vattn.transformers.group import LayerGroup, chosen
from vattn.transformers.row_moves import SPARE, row_moves

if TYPE_CHECKING:
    from vattn.transformers.memory import CacheMemory
    from vattn.transformers.steps import Step

Pair = tuple[torch.Tensor, torch.Tensor]


class VattnLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A full-attention layer whose keys and values live in a vattn.KVCache.

    `keys` and `values` are views (rows, heads, tokens, dim) of what it holds, or None before the first tokens and after
    `reset`. Assigning them edits the layer: see `assignment.py`.
    """

    # A compiled graph would need the whole buffer and a mask, and so read memory that is not committed.
    is_compileable = False

    def __init__(self, memory: CacheMemory) -> None:
        self.memory = memory
        self.group: LayerGroup | None = None
        self.index = 0
        self.rows = 0
        self.length = 0
        self.step: Step | None = None  # in which it moved last, and what it held before
        self.before: tuple[int, int, Pair | None] = (0, 0, None)
        self._dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)  # of the keys and values given
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._graph: Pair | None = None  # what is held, with its history, where some of it takes part in autograd
        self._half: Half | None = None
        self._room: tuple[torch.Tensor, ...] = ()
        self._room_rows = 0
        self._room_length = 0
        self._name = named(self)
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = memory.layers.append(self)  # among the cache's layers in vattn memory

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, (rows, heads, tokens, dim), or None. Assign new ones to edit or prune the layer."""
        return self._keys if self._half is None else self._half.seen("keys", self._keys)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        assign(self, "keys", tensor)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, (rows, heads, tokens, dim), or None. Assign new ones to edit or prune the layer."""
        return self._values if self._half is None else self._half.seen("values", self._values)

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        assign(self, "values", tensor)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take a place in memory for tensors like these, (rows, heads, tokens, dim); they may have no tokens."""
        self.memory.bind(self, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._dtypes = (key_states.dtype, value_states.dtype)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, (rows, heads, n, dim), and return views of all of them, (rows, heads, tokens, dim).

        The views are valid until the cache is cropped, reset, reordered or closed. With autograd on, the tensors are
        copies, as DynamicCache's are: gradients reach every token, and a graph that keeps them (the queries may train
        where the keys do not) is not disturbed by what the cache does next. Tokens in another dtype are converted where
        torch.cat would give what the layer holds.

        A refusal puts all layers of the cache back to where they were when the step began. Raises ValueError for a
        batch over `max_batch_size`, a length over `max_seq_len`, or tensors that do not fit what the layer holds;
        vattn.OutOfMemoryError when the memory cannot be had; vattn.ClosedError after `close`.
        """
        if is_compiling():
            return self._update_in_graph(key_states, value_states)
        steps = self.memory.steps
        try:
            if steps.current is not None and self.step is steps.current:
                steps.end()  # this layer comes round again: what that step moved stays, whatever becomes of this one
            rows, _, count, _ = key_states.shape
            if not rows and not self.length and not self.memory.is_closed:
                return key_states, value_states  # as DynamicCache: a batch of no rows attends over itself
            step = steps.current or steps.begin(rows, count)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            group = self.group
            assert group is not None
            start = self.length
            length = start + count
            heads, k_dim, v_dim, _, device = group.shape
            if not (
                key_states.shape == (rows, heads, count, k_dim)
                and value_states.shape == (rows, heads, count, v_dim)
                and ((key_states.dtype, value_states.dtype) == self._dtypes or self._takes(key_states, value_states))
                and key_states.device == device == value_states.device
                and (rows == self.rows or start == 0)
                and self._half is None
            ):
                self.refuse(_described(key_states, value_states))  # copy_ would convert or broadcast in silence
            if rows > group.rows or length > group.length:
                group.make_room(rows, length)
            graph = self._graph
            held, given = self._write(key_states, value_states, rows, start, length)
        except BaseException:
            steps.put_back()
            self.is_initialized = self.is_initialized and self.length > 0  # tokens of another shape may come
            raise
        self.step, self.before = step, (self.rows, start, None if self._graph is not None else graph)
        self.rows, self.length = rows, length
        self._keys, self._values = held
        return given

    def _update_in_graph(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """`update` as torch.compile traces it: see compiled.py."""
        takes_part = key_states.requires_grad or value_states.requires_grad or self._graph is not None
        if (torch.is_grad_enabled() and takes_part) or self._half is not None:
            keys, values = _plain_update(self, key_states, value_states)
            return keys, values
        if self.length == 0 or self._keys is None or self._values is None:
            keys, values = fill(key_states, value_states, self._name)  # copies
            return keys, values
        length = self.length + key_states.shape[2]
        keys, values = extend(key_states, value_states, self._name, self._keys, self._values, length)
        # The operator has done this already; the graph must know it, and must not take the memory for its own.
        self.length, self._keys, self._values = length, keys, values
        return (keys.clone(), values.clone()) if torch.is_grad_enabled() else (keys, values)

    def _takes(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether torch.cat would give the dtype that is held, as where autocast is switched on in between."""
        assert self.group is not None
        held = self.group.shape.dtype
        return all(torch.promote_types(tensor.dtype, held) == held for tensor in (key_states, value_states))

    def _write(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: int, start: int, length: int
    ) -> tuple[Pair, Pair]:
        """Put the tokens `start` to `length` in their place. What the layer holds with them, without holding it yet,
        and what the model is given of it."""
        if rows != self._room_rows or length > self._room_length:
            self._open_room(rows, length)
        key_room, value_room = self._room
        views = key_room.narrow(2, 0, length), value_room.narrow(2, 0, length)
        with_graph = torch.is_grad_enabled()
        takes_part = with_graph and (key_states.requires_grad or value_states.requires_grad or self._graph is not None)
        graph = self._joined(key_states, value_states, start) if takes_part else None
        with torch.no_grad():
            views[0].narrow(2, start, length - start).copy_(key_states)
            views[1].narrow(2, start, length - start).copy_(value_states)
        self._graph = graph  # none without autograd, as torch.cat
        if graph is not None:
            return graph, graph
        # A graph may keep what it is given, for the sake of the queries' gradient, and autograd does not see what is
        # written into this memory through other views.
        return views, (views[0].clone(), views[1].clone()) if with_graph else views

    def _joined(self, key_states: torch.Tensor, value_states: torch.Tensor, start: int) -> Pair:
        """All keys and all values as DynamicCache has them: copies that carry the history of every token."""
        if start == 0:
            return key_states.clone(), value_states.clone()
        assert self._keys is not None
        assert self._values is not None
        return torch.cat((self._keys, key_states), 2), torch.cat((self._values, value_states), 2)

    def put_back(self) -> None:
        """Hold what was held before the step."""
        self.rows, self.length, graph = self.before
        self.step = None
        self.is_initialized = self.is_initialized and self.length > 0  # tokens of another shape may come
        if self._graph is not None:
            keys, values = self._graph
            self._graph = (keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length))
        else:
            self._graph = graph
        self.refresh()

    def _open_room(self, rows: int, length: int) -> None:
        """Views that reach to the end of the last page, to be narrowed token by token: far cheaper than new ones."""
        assert self.group is not None
        length = self.group.reach(rows, length)
        self._room = self.group.views(self.index, rows, length)
        self._room_rows, self._room_length = rows, length

    def _close_room(self) -> None:
        """Let go of views that reach past what the layer will hold."""
        self._room = ()
        self._room_rows = self._room_length = 0

    def refuse(self, what: str) -> NoReturn:
        """ValueError: `what` does not fit the layer as it is."""
        if self._half is not None:
            raise ValueError(self._half.complaint(self._keys, self._values))
        held = ""
        if self.group is not None:
            shape = self.group.shape
            held = f", {shape.heads} heads of {shape.k_dim} and {shape.v_dim}, {shape.dtype} on {shape.device}"
        raise ValueError(
            f"{what} do not fit a layer that holds {self.length} tokens in {self.rows} rows{held}; "
            "reset() the cache before another batch"
        )

    def get_seq_length(self) -> int:
        """Tokens held, a plain int."""
        return self.length

    def get_max_length(self) -> int:
        """The most tokens it can hold."""
        return self.memory.limits.max_seq_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens; zero changes nothing, more than are held empties the layer.

        Raises ValueError for a positive count, as transformers does.
        """
        try:
            count = -operator.index(tokens_to_remove)
        except TypeError:
            raise TypeError(f"tokens_to_remove must be an int, got {tokens_to_remove!r}") from None
        if count < 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}; give a negative number of tokens to remove, or zero"
            )
        self.settle()
        if count and self.length:
            self.length = max(self.length - count, 0)
            if self._graph is not None:
                keys, values = self._graph
                self._graph = (keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length))
            self.refresh()
            self.trim()

    def reset(self) -> None:
        """Forget everything; the next tokens may come in another batch size."""
        self.forget()
        self.is_initialized = False
        self.trim()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies beside each other."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was; there may be more or fewer of them than rows."""
        self.settle()
        if self.group is None or self._keys is None or self._values is None or not self.length:
            return
        rows = chosen(self.rows, indices, self._keys.device)
        if rows.numel() == self.rows and self._graph is None:
            self._permute(rows)
            return
        graph = None if self._graph is None else tuple(tensor.index_select(0, rows) for tensor in self._graph)
        with torch.no_grad():
            keys, values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
            self.group.make_room(rows.numel(), self.length)
            self.rows, self._graph = rows.numel(), None
            for target, source in zip(self.refresh(), (keys, values), strict=True):
                target.copy_(source)
        if graph is not None:
            self._graph = (graph[0], graph[1])
            self.refresh()
        self.trim()

    def _permute(self, rows: torch.Tensor) -> None:
        """`batch_select_indices` of as many rows as there are: each where it is, and those that stay are not copied."""
        assert self._keys is not None
        assert self._values is not None
        with torch.no_grad():
            if rows.device.type != "cpu":  # to look at the numbers would wait for the device
                for tensor in (self._keys, self._values):
                    tensor.copy_(tensor.index_select(0, rows))
                return
            moves = row_moves(rows.tolist())
            for tensor in (self._keys, self._values):
                place = dict(enumerate(tensor.unbind(0)))
                for to, source in moves:
                    if to == SPARE:
                        place[SPARE] = place[source].clone()
                    else:
                        place[to].copy_(place[source])

    def offload(self) -> NoReturn:
        """Not offered: the addresses of the cache stay, so there is nothing to move."""
        raise NotImplementedError("VattnCache does not offload; use DynamicCache(offloading=True) for that")

    prefetch = offload

    def refresh(self) -> tuple[torch.Tensor, ...]:
        """Make `keys` and `values` what the layer holds now, and return views of them; nothing while it holds
        nothing."""
        self._close_room()
        self._keys = self._values = None
        if self._graph is not None and not (self.length and any(tensor.requires_grad for tensor in self._graph)):
            self._graph = None
        if self.group is not None and self.rows and not self.length:  # emptied: as DynamicCache has it
            heads, k_dim, v_dim, dtype, device = self.group.shape
            self._keys, self._values = (
                torch.empty(self.rows, heads, 0, dim, dtype=dtype, device=device) for dim in (k_dim, v_dim)
            )
        if self.group is None or not self.length:
            return ()
        views = self.group.views(self.index, self.rows, self.length)
        self._keys, self._values = views if self._graph is None else self._graph
        return views

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these tensors, (rows, heads, tokens, dim), that fit the layer, in place of what it holds."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.group is not None
        rows, _, length, _ = keys.shape
        graph = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        with torch.no_grad():
            old = (self._keys, self._values)
            given = [apart(tensor, held) for tensor, held in zip((keys, values), old, strict=True)]
            self.group.make_room(rows, length)
            self.rows, self.length, self._graph = rows, length, None
            for target, source in zip(self.refresh(), given, strict=True):
                if source is not None:
                    target.copy_(source)
        if graph:
            self._graph = (keys.clone(), values.clone())
            self.refresh()
        self.trim()

    def settle(self) -> None:
        """ValueError while only one of `keys` and `values` was assigned."""
        if self._half is not None:
            raise ValueError(self._half.complaint(self._keys, self._values))

    def forget(self) -> None:
        """Hold nothing, without giving memory back yet."""
        self._close_room()
        self._keys = self._values = self._graph = self._half = None
        self.rows = self.length = 0

    def twin(self, memory: CacheMemory) -> VattnLayer:
        """The same layer for a copy of the cache, without a group yet."""
        return self.twin_of(VattnLayer(memory), {})

    def twin_of(self, twin: VattnLayer, beside: dict[str, Any]) -> VattnLayer:
        """`twin`, a new layer of a copy of the cache, made like this one, with copies of the attributes `beside`."""
        self.settle()
        vars(twin).update(copy.deepcopy(beside))
        twin.rows, twin.length, twin.is_initialized = self.rows, self.length, self.is_initialized
        twin._graph, twin._dtypes = self._graph, self._dtypes
        if self.is_initialized:
            twin.dtype, twin.device = self.dtype, self.device
        return twin

    def trim(self) -> None:
        if self.group is not None:
            self.group.trim()

    def __deepcopy__(self, memo: dict[int, Any]) -> VattnLayer:
        copy.deepcopy(self.memory, memo)
        twin: VattnLayer = memo[id(self)]
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "cannot pickle a VattnLayer: its memory belongs to this process; save clones of .keys and .values"
        )


# The decorator, as transformers' classes and methods elsewhere, has no types.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _plain_update(layer: VattnLayer, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
    """`update` outside of the graph."""
    return layer.update(key_states, value_states)


def _described(keys: torch.Tensor, values: torch.Tensor) -> str:
    return (
        f"key_states {tuple(keys.shape)} {keys.dtype} on {keys.device} and value_states {tuple(values.shape)} "
        f"{values.dtype} on {values.device}"
    )
