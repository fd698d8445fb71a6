"""One step of a model through the layers of a cache, and the way back.

What it is: a forward pass reaches the cache layer by layer, so a layer in the middle can be refused what it needs when
others have moved. `Steps` makes the room in every group before the first layer moves, and keeps of each layer that has
moved what it takes to put it back: a length for those in vattn memory, a closure for those that transformers keeps.

What it promises: after `put_back` every layer holds what it held when the step began, or, where a state has been
overwritten that nobody kept, the cache takes no more tokens until `reset` and says so. Nothing is copied for it but
the short states of convolutions, and recurrent states where no mask told the length of the step.

Thread: one at a time, as the transformers cache it belongs to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import vattn

if TYPE_CHECKING:
    from vattn.transformers.memory import CacheMemory


class Step:
    """What has moved since the step began. `undo` has an entry for each layer outside vattn memory, in order."""

    __slots__ = ("assured", "last", "lost", "undo")

    def __init__(self, assured: bool) -> None:
        self.undo: dict[Any, Callable[[], None]] = {}
        self.assured = assured  # the room for all of it was made before anything moved
        self.last = -1  # the last layer, by its place in the model, among those in `undo`
        self.lost = ""  # what cannot be put back


class Steps:
    """The steps of one cache. A step ends when a layer that has moved in it comes round again, or by `end`."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = weakref.ref(memory)  # which holds this
        self.current: Step | None = None
        self.torn = ""  # why the cache takes no more tokens until it is reset
        self._expected = False

    @property
    def memory(self) -> CacheMemory:
        """The memory of the cache."""
        memory = self._memory()
        assert memory is not None  # only its own layers come here, and they hold it
        return memory

    def begin(self, rows: int | None = None, count: int = 0) -> Step:
        """A new step, of `count` tokens in `rows` rows where they are known; ValueError or OutOfMemoryError where they
        have no room. Nothing has moved then."""
        memory = self.memory
        if memory.is_closed:
            raise vattn.ClosedError("the VattnCache is closed; make a new one")
        if self.torn:
            raise vattn.Error(self.torn)
        self.end()
        if rows is not None and (memory.has_others or len(memory.groups) > 1):
            memory.reserve(rows, count)
        self.current = step = Step(self._expected or rows is not None)
        self._expected = False
        return step

    def expect(self, count: int) -> None:
        """A forward pass of `count` tokens begins: make room for it, in the rows that are held."""
        rows = self.memory.rows()
        if rows and not self.memory.is_closed and not self.torn:
            self.memory.reserve(rows, count)
        self.end()
        self._expected = rows > 0

    def end(self) -> None:
        """What has moved stays where it is."""
        if self.current is not None:
            self.current.undo.clear()  # layers may know the step for a while yet; they need not keep its tensors
            self.current = None

    def reset(self) -> None:
        """The cache is made empty: nothing is torn any more."""
        self.end()
        self.torn, self._expected = "", False

    def edited(self, layer: Any) -> None:
        """The keys of `layer` were assigned: in mid-step what it held before can be put back only if it was nothing."""
        step = self.current
        if step is not None and layer.step is step and layer.before[1]:
            step.lost = "a layer whose keys were assigned"

    def put_back(self) -> None:
        """Every layer back to where it was when the step began."""
        step, self.current, self._expected = self.current, None, False
        if step is None:
            return
        moved = [layer for layer in self.memory.layers if layer.step is step]
        for undo in reversed(step.undo.values()):
            undo()
        for layer in moved:
            layer.put_back()
        if moved:
            for group in self.memory.groups:
                group.trim()
        if step.lost:
            self.lose(step.lost)

    def lose(self, what: str) -> None:
        """`what` has moved in a step that was refused, and cannot be put back."""
        self.torn = (
            f"a step was refused when {what} had moved, and that cannot be put back; reset() the cache and feed the "
            "tokens again"
        )

    # ------------------------------------------------------------ layers that transformers keeps

    def enter(self, key: Any, index: int, rows: int | None = None, count: int = 0) -> Step:
        """The step in which the layer `key`, the model's `index`th, moves now."""
        step = self.current
        if step is None or key in step.undo or index < step.last:
            step = self.begin(rows, count)
        step.last = index
        return step

    def update(self, layer: Any, index: int, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        """`layer.update` of a sliding window, (rows, heads, n, dim) in and out."""
        count = keys.shape[2] if keys is not None else 0
        try:
            step = self.enter(layer, index, keys.shape[0] if count else None, count)
            before = _attributes(layer)
            step.undo[layer] = lambda: vars(layer).update(before)
            got = layer.update(keys, values, *args, **kwargs)
        except BaseException:
            self.put_back()
            raise
        held = before.get("keys")
        if count and held is not None:
            # The window that was held is the front of what the layer made now, so keep that and not a second copy.
            step.undo[layer] = _shrink(layer, before, held.shape[2] if held.dim() == 4 else 0, count, got)
        return got

    def touch(self, layer: Any, index: int, state: int) -> None:
        """A state-space layer is about to read or write its state number `state`, perhaps in place."""
        step = self.current
        if step is None or index < step.last:
            step = self.enter(layer, index)
        if (layer, state) in step.undo:
            return
        step.last = index
        step.undo[layer, state] = _state(layer, state, step)


def _attributes(layer: Any) -> dict[str, Any]:
    """The layer's attributes, dicts of states copied one level deep."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}


def _shrink(layer: Any, before: dict[str, Any], held: int, count: int, got: Any) -> Callable[[], None]:
    """How to put a window back that held `held` tokens, from the tensors it has now."""
    pairs = [got, (layer.keys, layer.values)]
    whole = next((pair for pair in pairs if pair[0].shape[2] == held + count), None)
    if whole is None or not held:
        return lambda: vars(layer).update(before)
    keys, values = whole
    rest = {name: value for name, value in before.items() if name not in ("keys", "values")}

    def undo() -> None:
        vars(layer).update(rest)
        layer.keys, layer.values = keys[:, :, :held], values[:, :, :held]

    return undo


def _state(layer: Any, state: int, step: Step) -> Callable[[], None]:
    """How to put state number `state` of a state-space layer back."""
    if not layer.has_previous_state[state]:
        before = _attributes(layer)

        def forget() -> None:
            # Nothing was held: tensors that were there are zeros that nobody reads, as after a reset.
            for name in ("conv_states", "recurrent_states", "is_conv_states_initialized", "conv_kernel_size"):
                getattr(layer, name)[state] = before[name][state]
            layer.is_recurrent_states_initialized[state] = before["is_recurrent_states_initialized"][state]
            layer.has_previous_state[state] = False
            for tensor in (layer.conv_states[state], layer.recurrent_states[state]):
                if tensor is not None:
                    tensor.zero_()

        return forget
    conv, recurrent = layer.conv_states[state], layer.recurrent_states[state]
    kept_conv = None if conv is None else conv.clone()
    if recurrent is not None and step.assured:
        kept_recurrent = None  # as large as the state itself, and the room for this step is there
    else:
        kept_recurrent = None if recurrent is None else recurrent.clone()

    def restore() -> None:
        if recurrent is not None:
            if kept_recurrent is None:
                step.lost = "a state-space layer"
            else:
                recurrent.copy_(kept_recurrent)
        if conv is not None:
            conv.copy_(kept_conv)
        layer.conv_states[state], layer.recurrent_states[state] = conv, recurrent
        layer.has_previous_state[state] = True

    return restore
