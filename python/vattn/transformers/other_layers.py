"""The layers of a cache that stay as transformers makes them: windows, states, dummies, an encoder's half.

What it is: what a VattnCache does to all of its layers at once, done so that theirs keep its promises too.

What it promises: `in_every_layer` changes every layer or, where one refuses, none; a layer that was closed takes no
tokens.

Thread: one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import vattn
from vattn.transformers.layer import VattnLayer


def in_every_layer(layers: Iterable[Any], name: str, argument: Any) -> None:
    """Call method `name` of every layer. Those of transformers go first, since they may refuse where vattn's do not:
    a window cannot be cropped once it has moved, say. They only assign new tensors, so the old ones can be put back."""
    layers = list(layers)
    others = [layer for layer in layers if not isinstance(layer, VattnLayer)]
    before = [
        {key: dict(value) if isinstance(value, dict) else value for key, value in vars(one).items()} for one in others
    ]
    try:
        for layer in others:
            getattr(layer, name)(argument)
        for layer in layers:
            if isinstance(layer, VattnLayer):
                getattr(layer, name)(argument)
    except BaseException:
        for layer, attributes in zip(others, before, strict=True):
            vars(layer).update(attributes)
        raise


def reset_layers(layers: Iterable[Any]) -> None:
    """Empty every layer. The releases before 5.23 zero a dynamic layer's tensors and keep their length, so they are
    dropped here."""
    for layer in layers:
        layer.reset()
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


def close_layers(layers: Iterable[Any]) -> None:
    """Empty the layers that transformers keeps, for good: from now on they refuse tokens."""
    for layer in layers:
        if hasattr(layer, "conv_states"):
            for states in (layer.conv_states, layer.recurrent_states):
                states.update(dict.fromkeys(states))
            for flags in ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized"):
                getattr(layer, flags).update(dict.fromkeys(getattr(layer, flags), False))
        if not isinstance(layer, VattnLayer):
            reset_layers([layer])
            layer.update = _refuse
        for name in ("update_conv_state", "update_recurrent_state", "update_indexer"):
            if hasattr(layer, name):
                setattr(layer, name, _refuse)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise vattn.ClosedError("the VattnCache is closed; make a new one")
