"""Which models may use `attn_implementation="vattn"`: those whose attention is looked up by that name and wants no more
than it gives.

What it is: a check, made where a model is built, loaded or switched, and the two methods of transformers that are
wrapped to make it. transformers has no hook there: it takes every registered name for every model, and a model whose
attention is of the old kind fails at its first forward pass, or runs and never calls it. The wrappers do nothing for
any other name.

What it promises: a model that would not call the vattn attention, or would want another mask than that of "sdpa", is a
ValueError that names its class, before any of its weights are made or its configuration is changed.

Thread: any; installing twice changes nothing.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

#: Folders of transformers.models without "sdpa", all for their sinks or soft caps, whose masks are handed to the
#: attention function as they are made. Others may do sums with masks that only "eager" makes, as DeepSeek V4 does. The
#: run behind docs/families.md, and tests, compare them with "eager".
WITHOUT_SDPA = (
    "flint",
    "gemma2",
    "gpt_oss",
    "granite_swa",
    "granitemoe_swa",
    "inkling2",
    "inkling2_loop",
    "mimo_v2_flash",
    "t5gemma",
    "vaultgemma",
)
_MODULES_WITHOUT_SDPA = {f"transformers.models.{name}.modeling_{name}" for name in WITHOUT_SDPA}


def refusal(model: PreTrainedModel, name: str) -> str:
    """Why `model` may not use the attention called `name`; empty if it may."""
    kind = type(model)
    ways = (
        "leave attn_implementation out; VattnCache works with any. For one part of a composite model give a dict: "
        f'attn_implementation={{"text_config": "{name}"}}'
    )
    if not kind._can_set_attn_implementation():
        return (
            f'attn_implementation="{name}": {kind.__name__} has an attention of its own that is not looked up by name '
            f"(transformers' AttentionInterface), so it would never be called; {ways}"
        )
    if _looks_up(kind) and not kind._supports_sdpa and kind.__module__ not in _MODULES_WITHOUT_SDPA:
        return (
            f'attn_implementation="{name}": {kind.__name__} does not offer "sdpa", so its attention may need masks '
            f'that only "eager" makes; {ways}'
        )
    return ""


def watch(name: str) -> None:
    """Make transformers refuse the attention called `name` where `refusal` says so."""
    build, switch = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation
    if getattr(switch, "vattn_watches", None) == name:
        return

    @functools.wraps(build)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        if requested_attention == name:
            _raise(refusal(self, name))
        return build(self, requested_attention, *args, **kwargs)

    @functools.wraps(switch)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # A model of the old kind is passed over in there, with a line in the log.
        asked = {id(config) for config in _configs(self.config, attn_implementation, name)}
        for model in self.modules():
            if isinstance(model, PreTrainedModel) and id(model.config) in asked:
                _raise(refusal(model, name))
        return switch(self, attn_implementation, *args, **kwargs)

    # A function takes attributes; its type does not say so.
    set_attn_implementation.vattn_watches = name  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def _raise(reason: str) -> None:
    if reason:
        raise ValueError(reason)


def _configs(config: PreTrainedConfig, asked: str | dict[str, Any], name: str) -> Iterator[PreTrainedConfig]:
    """`config` and those in it that `attn_implementation=asked` gives the attention called `name`."""
    own = asked.get("") if isinstance(asked, dict) else asked
    if own == name:
        yield config
    for key in config.sub_configs:
        if (inner := getattr(config, key, None)) is not None and (
            of_inner := asked.get(key) if isinstance(asked, dict) else asked
        ) is not None:
            yield from _configs(inner, of_inner, name)


def _looks_up(kind: type[PreTrainedModel]) -> bool:
    """Whether the module that defines `kind` looks attention functions up. If it neither does nor has an attention of
    its own, there is nothing to refuse: its parts are models, which are asked by themselves, or state-space layers."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return True
