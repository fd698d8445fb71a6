"""Tensors of vattn's memory are pickled, saved and sent as what they show, not as the addresses that they span.

torch writes the whole storage of a tensor, and to send one to another process it moves the storage into shared memory.
A head-major view of 16 tokens has a storage that spans the gaps between its heads: 448 MiB for 64 KiB of tokens; and a
tensor whose storage was moved no longer shows the cache. So exact ``torch.Tensor`` has reducers here, registered where
Python has its extension points for that: ``copyreg`` (pickle, torch.save, cloudpickle), ``ForkingPickler`` (queues,
processes, DataLoader), and the table of ``copy.deepcopy``. Each leaves a tensor whose memory is not vattn's to whoever
would have had it, and reduces a clone of what a tensor of vattn's shows otherwise:

* pickle, torch.save, deepcopy: where the storage is larger than what is shown. Tensors that share memory then no longer
  do so in the copy, as after ``.clone()``.
* to another process: always, so that the sender's tensor stays where it is. The clone is made when the tensor is
  pickled; for a queue that is in its own thread, some time after ``put``.

Promise: installed once, before the first tensor is handed out. Thread: any.
"""

from __future__ import annotations

import copy
import copyreg
import io
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from typing import Any

from vattn import _core
from vattn._torch import require

Reducer = Callable[[Any], Any]

_lock = threading.Lock()
_installed = False
# What a child process is still to open, kept until it has: torch itself keeps no reference to what it shares.
_sent_to: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def install() -> None:
    """Registers the reducers. The native part calls this before it makes its first tensor.

    ModuleNotFoundError: torch is not installed.
    """
    global _installed
    torch = require("a tensor over vattn's memory")
    with _lock:
        if _installed:
            return
        earlier: Reducer | None = copyreg.dispatch_table.get(torch.Tensor)
        copyreg.pickle(torch.Tensor, _pickler(earlier or _reduce_as_torch))
        for kind in (torch.Tensor, torch.nn.Parameter):
            # torch.multiprocessing registered its own when torch was imported.
            sender = ForkingPickler(io.BytesIO()).dispatch_table[kind]
            ForkingPickler.register(kind, _sender(sender))
        copiers = getattr(copy, "_deepcopy_dispatch", None)  # no name of its own in the library's documents
        if copiers is not None:
            copiers.setdefault(torch.Tensor, _deepcopy)
        _installed = True


def _reduce_as_torch(tensor: Any) -> Any:
    return tensor.__reduce_ex__(4)


def _pickler(otherwise: Reducer) -> Reducer:
    def reduce(tensor: Any) -> Any:
        # copy.copy asks the same table, and a shallow copy shares its memory.
        if sys._getframe(1).f_code is copy.copy.__code__ or not _shows_less_than_it_spans(tensor):
            return otherwise(tensor)
        return otherwise(_clone(tensor))

    return reduce


def _sender(otherwise: Reducer) -> Reducer:
    def reduce(tensor: Any) -> Any:
        if not is_vattns(tensor) or (tensor.requires_grad and not tensor.is_leaf):  # the latter torch refuses
            return otherwise(tensor)
        clone = _clone(tensor)
        child = context.get_spawning_popen()
        if child is not None:
            _sent_to.setdefault(child, []).append(clone)
        return otherwise(clone)

    return reduce


def _deepcopy(tensor: Any, memo: dict[int, Any]) -> Any:
    if not tensor.is_leaf or not _shows_less_than_it_spans(tensor):
        return tensor.__deepcopy__(memo)
    clone = _clone(tensor)
    clone.__dict__ = copy.deepcopy(tensor.__dict__, memo)
    clone.grad = copy.deepcopy(tensor.grad, memo)
    memo[id(tensor)] = clone
    return clone


def is_vattns(tensor: Any) -> bool:
    try:
        return _core.owns(tensor.untyped_storage().data_ptr())
    except RuntimeError:  # no storage, or none with an address: a sparse tensor, one inside of a functional transform
        return False


def _shows_less_than_it_spans(tensor: Any) -> bool:
    if not is_vattns(tensor):
        return False
    return int(_shown_once(tensor).nbytes) < int(tensor.untyped_storage().nbytes())


def _shown_once(tensor: Any) -> Any:
    """The tensor without the repetitions of ``expand``."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _clone(tensor: Any) -> Any:
    """What the tensor shows, in memory of its own, with all else that torch would have written of it."""
    import torch

    with torch.no_grad():
        clone = _shown_once(tensor.detach()).clone().expand(tensor.shape)
    if type(tensor) is torch.nn.Parameter:
        clone = torch.nn.Parameter(clone, requires_grad=tensor.requires_grad)
    else:
        clone.requires_grad_(tensor.requires_grad)
    clone.__dict__.update(tensor.__dict__)
    return clone
