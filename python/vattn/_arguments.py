"""Arguments as users give them, turned into what the native part takes.

Promise: a wrong type is a ``TypeError``, a wrong value a ``ValueError`` or an ``OverflowError``; each names the
parameter and the value, and nothing has changed yet. Thread: any; pure functions.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from vattn.sizes import parse_size, shown

_INT64_MAX = 2**63 - 1


def is_torch_tensor(value: object) -> bool:
    """Whether ``value`` is a torch tensor, asked without importing torch."""
    # By its bases: a subclass may be of any module, and not all of torch's with a data_ptr are tensors (storages).
    return any(base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(value).__mro__)


def to_int(value: Any, name: str) -> int:
    """``value`` as an int: ints, numpy integers, 0-d integer tensors; not bool, not float."""
    # A bool would pass for 0 or 1 everywhere, which is never what was meant; a numpy or torch one says so in its dtype.
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={shown(value)} must be an int, not {type(value).__name__}")
    try:
        number = operator.index(value)
    except Exception as error:
        raise TypeError(f"{name}={shown(value)} cannot be used as an int: {error}") from error
    if not -_INT64_MAX <= number <= _INT64_MAX:
        raise OverflowError(f"{name}={shown(number)} does not fit in 64 bits")
    return number


def to_optional_int(value: Any, name: str) -> int | None:
    return None if value is None else to_int(value, name)


def to_optional_size(value: Any, name: str) -> int | None:
    return None if value is None else parse_size(value, name)


def to_size(value: Any, name: str, owner: str) -> int:
    """A size that must be there: of an ``owner`` that exists already, None would say nothing."""
    if value is None:
        raise TypeError(f"{name}=None must be a number of bytes or text such as '20GiB' once the {owner} exists")
    return parse_size(value, name)


def to_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} must be True or False, not {type(value).__name__}")
    return value


def to_choice(value: Any, name: str, choices: Sequence[str]) -> str | None:
    """One of ``choices``, or None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a str or None, not {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} must be None or one of {', '.join(map(repr, choices))}")
    return value


def to_dtype_name(value: Any, name: str = "dtype") -> str:
    """The name of a ``torch.dtype``; the name itself is taken too, so that accounting needs no torch."""
    if isinstance(value, str):
        return value.removeprefix("torch.")
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    raise TypeError(f"{name}={shown(value)} must be a torch.dtype such as torch.bfloat16, not {type(value).__name__}")


def to_device_name(value: Any, name: str = "device") -> str:
    """``"cpu"``, ``"cuda:N"`` or ``"meta"``, from a str or a ``torch.device``. ``"cuda"`` is torch's current device."""
    is_torch_device = type(value).__module__ == "torch" and type(value).__name__ == "device"
    if not isinstance(value, str) and not is_torch_device:
        raise TypeError(f"{name}={shown(value)} must be a str or a torch.device, not {type(value).__name__}")
    text = str(value)
    kind, _, index = text.partition(":")
    if kind in ("cpu", "meta") and index.isdecimal() and int(index) == 0:
        return kind  # one name for one device: "meta:0" is "meta"
    if text == "cuda":
        import sys

        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return f"cuda:{torch.cuda.current_device()}"
    return "cuda:0" if text == "cuda" else text


def to_ints(value: Any, name: str) -> list[int]:
    """A sequence of ints: list, tuple, range, numpy or torch integers of one dimension."""
    if isinstance(value, str | bytes | bytearray | Mapping):
        raise TypeError(f"{name}={shown(value)} must be a sequence of ints, not {type(value).__name__}")
    if hasattr(value, "tolist"):
        try:
            value = value.tolist()
        except Exception as error:  # a tensor without data: meta, sparse
            raise TypeError(f"{name}: a {type(value).__name__} whose numbers cannot be read ({error})") from error
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}={shown(value)} must be a one-dimensional sequence of ints, not {type(value).__name__}")
    return [to_int(item, name) for item in value]


def to_lengths(value: Any) -> dict[Any, Any] | list[int]:
    """What ``step`` and ``fits`` take and the native part does not read itself.

    That is: other mappings, sequences and integer types.
    """
    if isinstance(value, Mapping):
        return {to_int(slot, "lengths: slot"): to_int(length, "lengths: length") for slot, length in value.items()}
    return to_ints(value, "lengths")
