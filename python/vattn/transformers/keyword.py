"""The name under which transformers takes a cache: `cache`, and before 5.24 `past_key_values`.

What it is: for code that runs on every release that vattn supports. Code for one release writes the name itself.

Thread: any.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers.generation.utils import GenerationMixin


def cache_argument(cache: Any) -> dict[str, Any]:
    """`cache`, any transformers cache or None, as the keyword that the installed release knows:
    `model.generate(**inputs, **cache_argument(cache))`, and the same for a call of the model."""
    return {_name(): cache}


@functools.cache
def _name() -> str:
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"
