"""A layer's update as torch.compile sees it: one operator, of which it knows the shapes and nothing else.

What it is: a compiled graph cannot hold the calls that grow memory, so it calls an operator that runs the layer's own
`update` in mid-graph. The layer is named by a tensor, so that a graph serves every cache and not only the one it was
made with. A prompt in an empty layer has a second operator, because no strides are known then: it hands back copies.

What it promises: the tokens of the plain update, with `fullgraph=True`, and no new graph for a new length. An update
that takes part in autograd is not for the operators, which have no gradient: the layer leaves the graph for it.

Thread: any; the layers are one thread's each.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vattn.transformers.layer import VattnLayer

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, VattnLayer] = weakref.WeakValueDictionary()


def named(layer: VattnLayer) -> torch.Tensor:
    """The name of `layer` in graphs: an input of theirs, where a number would be part of them."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


@torch.library.custom_op("vattn::fill_layer", mutates_args=())
def fill(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the first tokens, (rows, heads, n, dim), into a layer; copies of them to attend over."""
    _update(layer, keys, values)
    return keys.contiguous().clone(), values.contiguous().clone()


@fill.register_fake
def _(keys: torch.Tensor, values: torch.Tensor, layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys.new_empty(keys.shape), values.new_empty(values.shape)


@torch.library.custom_op("vattn::extend_layer", mutates_args=())
def extend(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    held_keys: torch.Tensor,
    held_values: torch.Tensor,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add tokens, (rows, heads, n, dim), to a layer that holds some; views of all `length` of them."""
    return _update(layer, keys, values)


@extend.register_fake
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    held_keys: torch.Tensor,
    held_values: torch.Tensor,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _longer(held_keys, length), _longer(held_values, length)


def _longer(held: torch.Tensor, length: int) -> torch.Tensor:
    """Like `held`, (rows, heads, tokens, dim), with `length` tokens: the rows of a cache have fixed strides."""
    rows, heads, _, dim = held.shape
    return held.new_empty_strided((rows, heads, length, dim), held.stride())


def _update(name: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    layer = _layers[int(name)]
    memory = layer.memory
    try:
        layer.update(keys, values)
    except BaseException:
        if memory.has_states:  # which a graph writes in place
            memory.steps.lose("a state-space layer")
        raise
    assert layer.group is not None
    # Tensors of their own storage: those of the layer share one, which the graph must not take for its own.
    return layer.group.views(layer.index, layer.rows, layer.length)
