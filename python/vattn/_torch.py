"""torch, for what needs it: the package itself, its errors, and accounting on meta work without.

Thread: any; a pure function.
"""

from __future__ import annotations

from typing import Any


def require(what: str) -> Any:
    """The module torch. ModuleNotFoundError, saying what needs it and what to install, where there is none."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # torch is there, and what it needs is not
            raise
        raise ModuleNotFoundError(
            f"{what} needs torch, which is not installed: `pip install torch`", name="torch"
        ) from error
    return torch
