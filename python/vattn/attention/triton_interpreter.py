"""Whether Triton's interpreter, which runs kernels without a GPU, works with the NumPy that is installed.

Triton 3.6 converts arrays of one element to integers in a way that NumPy 2.4 refuses, so that every loop over a number
that was passed in fails. Which releases fit is theirs to change; one small kernel shows it. Any thread.
"""

from __future__ import annotations

import functools
import importlib.metadata

import torch
import triton
from triton import language as tl


@triton.jit
def count(out, n):  # type: ignore[no-untyped-def]  # a kernel's parameters have no Python types
    counted = 0
    for _ in range(n):
        counted += 1
    tl.store(out, counted)


@functools.cache
def problem() -> str:
    """Why kernels cannot be interpreted here; empty where they can."""
    out = torch.zeros(1, dtype=torch.int32)
    try:
        count[(1,)](out, 3)
    except Exception as error:  # whatever a release raises: the words are for a person
        cause = error.__cause__ or error
        versions = f"Triton {triton.__version__} with NumPy {importlib.metadata.version('numpy')}"
        return f"the interpreter of {versions} fails ({type(cause).__name__}: {cause}): install other releases of them"
    return "" if int(out) == 3 else f"the interpreter of Triton {triton.__version__} counts to {int(out)}, not to 3"
