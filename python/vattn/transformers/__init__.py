"""vattn under Hugging Face transformers: a cache for `model.generate`, and an attention function that reads it well.

    import vattn.transformers

    cache = vattn.transformers.VattnCache(model.config)
    model.generate(**inputs, cache=cache)         # before transformers 5.24: past_key_values=cache

What it promises: with `VattnCache` a model produces the tokens that it produces with `DynamicCache`, while a new token
is written where it belongs instead of copying every earlier one, and memory follows what is in use instead of a length
chosen up front. Importing this module also registers `attn_implementation="vattn"` (see `attention.py`); it works with
any cache.

Files, bottom up: `lease.py` (where rows get their slots), `group.py` (the layers of one shape, which grow together),
`compiled.py` (an update as torch.compile sees it), `assignment.py` (what assigned keys do), `layer.py` (a model layer's
share of a group), `mixed_layers.py` (layers that hold more than keys), `other_layers.py` (those that transformers
keeps), `steps.py` (what a refused step puts back), `memory.py` (the groups of one cache), `cache_pool.py` (many
conversations on one KVCache), `checks.py` (what is refused early), `cache.py` (`VattnCache`), `encoder_decoder.py` (the
same for encoder-decoder models), `attention.py` (the attention function), with `attention_keywords.py`, `masks.py` and
`offered.py` (which models may use it); `model_length.py` and `keyword.py` know what models and releases call things.

Thread: as any transformers cache, one thread at a time a cache; different caches are independent.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401  (asked for here so that one message names both)
    import transformers as _transformers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "vattn.transformers needs torch and transformers: pip install 'vattn[transformers]'", name=error.name
    ) from error

_version = tuple(int(part) for part in _transformers.__version__.split(".")[:2])
if not (5, 17) <= _version < (6, 0):
    raise ImportError(
        f"vattn.transformers needs transformers >= 5.17, < 6, found {_transformers.__version__}: "
        "pip install 'vattn[transformers]'"
    )

# Only now: these modules need the releases checked above, hence E402.
from vattn.transformers.attention import register as _register  # noqa: E402
from vattn.transformers.cache import VattnCache  # noqa: E402
from vattn.transformers.cache_pool import VattnCachePool  # noqa: E402
from vattn.transformers.keyword import cache_argument  # noqa: E402
from vattn.transformers.layer import VattnLayer  # noqa: E402

_register()

__all__ = ["VattnCache", "VattnCachePool", "VattnLayer", "cache_argument"]
