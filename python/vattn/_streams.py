"""CUDA streams as users give them, turned into the handles that the native part takes.

Promise: what is no stream is a ``TypeError``, a stream of another device a ``ValueError``; each names the parameter and
the value, and nothing has changed yet. Needs torch only where torch is already loaded. Thread: any; pure functions.
"""

from __future__ import annotations

import sys
from typing import Any

from vattn._arguments import to_int
from vattn.sizes import shown

_ACCEPTED = "a torch.cuda.Stream, an object with __cuda_stream__, or the handle as an int"


def to_stream(value: Any, device_name: str, name: str = "stream") -> int | None:
    """The stream to hand down: the one given, else torch's current one of the device; None where there is neither.

    Read, and so checked, on every device; only cuda has a use for it.
    """
    if value is None:
        return current_stream(device_name)
    handle = to_handle(value, device_name, name)
    return handle if device_name.startswith("cuda") else None


def to_handle(value: Any, device_name: str, name: str = "stream") -> int:
    """The ``CUstream`` of a stream given as one of the accepted forms; 0 is the default stream."""
    handle: Any = value
    if hasattr(value, "cuda_stream"):  # torch's
        _check_device(value, device_name, name)
        handle = value.cuda_stream
    elif hasattr(value, "__cuda_stream__"):
        # https://nvidia.github.io/cuda-python/cuda-core/latest/interoperability.html: (version of the protocol, handle)
        try:
            said = value.__cuda_stream__() if callable(value.__cuda_stream__) else value.__cuda_stream__
            version, handle = said
        except Exception as error:
            raise TypeError(
                f"{name}={shown(value)}: its __cuda_stream__ must give (version, handle): {error}; give {_ACCEPTED}"
            ) from error
        if version != 0:
            raise TypeError(
                f"{name}={shown(value)}: its __cuda_stream__ has version {shown(version)}, and only 0 is known here; "
                "give the handle as an int"
            )
    elif not hasattr(value, "__index__"):
        raise TypeError(f"{name}={shown(value)} must be {_ACCEPTED}, not {type(value).__name__}")
    number = to_int(handle, name)
    if number < 0:
        raise ValueError(f"{name}={shown(value)}: a handle is not negative; give {_ACCEPTED}")
    return number


def current_stream(device_name: str) -> int | None:
    """torch's current stream of a cuda device; None where torch runs nothing there, or the device has no streams."""
    if not device_name.startswith("cuda"):
        return None
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.current_stream(device_name).cuda_stream)


def _check_device(stream: Any, device_name: str, name: str) -> None:
    device = getattr(stream, "device", None)
    if device_name.startswith("cuda") and device is not None and str(device) != device_name:
        raise ValueError(
            f"{name}={shown(stream)} is on {device}, and this is on {device_name}: give a stream of that device"
        )
