"""One family of causal language models: its tiny model with VattnCache and the vattn attention, beside transformers'.

What it is: the check behind docs/families.md. Two rows, the first padded on the left, sixteen new tokens, the logits of
each compared.

What it promises: a result for whatever happens, an exception's text included. A model that does not look back is not
counted as held: one token's key in a held layer is changed after the prompt, and the logits must change.

Thread: one at a time; it seeds torch's generator.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from family_configs import VOCAB, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import vattn.transformers
from vattn.transformers.attention import attention_forward

PROMPT, NEW, PADS = 14, 16, 4
TOLERANCE = 1e-4
MOST_PARAMETERS = 12_000_000
#: The token whose key is changed, and in which row.
DAMAGED_ROW, DAMAGED_TOKEN = 1, 12


@dataclasses.dataclass
class Result:
    """What came of one family. Empty texts: nothing to say."""

    family: str
    model: str = ""
    #: Why there is nothing more: it did not build, or did not run with DynamicCache.
    skipped: str = ""
    #: Layers of the cache by the name of their class, beside those held.
    layers: int = 0
    held: int = 0
    others: dict[str, int] = dataclasses.field(default_factory=dict)
    #: Why VattnCache was refused at its constructor; what else went wrong with it.
    cache_refused: str = ""
    cache_error: str = ""
    #: The largest difference of a logit: VattnCache beside DynamicCache.
    cache_difference: float | None = None
    #: The same for a cache with one key changed, in the first held layer that shows.
    damage_difference: float | None = None
    #: Why the vattn attention was refused, at loading or at the first forward pass.
    attention_refused: str = ""
    attention_error: str = ""
    attention_calls: int = 0
    #: The vattn attention and VattnCache (if it is not refused) beside "eager" and DynamicCache; `magnitude`: the
    #: largest logit.
    attention_difference: float | None = None
    magnitude: float | None = None
    #: Keywords that were given to it.
    keywords: list[str] = dataclasses.field(default_factory=list)


def families() -> list[str]:
    """The names of transformers' table of causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check(family: str) -> Result:
    """Everything of one family."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    result = Result(family, name if isinstance(name, str) else name[0])
    try:
        model = build(family)
        with_dynamic = _logits(model, transformers.DynamicCache(config=model.config))
    except Exception as error:
        result.skipped = _text(error)
        return result
    _check_cache(model, with_dynamic, result)
    _check_attention(model, result)
    return result


def build(family: str) -> Any:
    """The tiny model, with weights drawn wide enough that it looks back."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny_config(family, kind)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters, more than {MOST_PARAMETERS}")
    torch.manual_seed(0)
    model = kind(config).eval()
    _draw(model)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def _draw(model: torch.nn.Module) -> None:
    """Weights of matrices so wide that a layer's output is of the size of its input, and scores differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if name.endswith(("sinks", "sink")):
                parameter.normal_(0.0, 1.0, generator=generator)
            elif parameter.dim() >= 2 and not name.endswith(("A_log", "A", "D", "dt_bias")):
                wide = 1.0 if "embed" in name or "lm_head" in name else 1.5
                parameter.normal_(0.0, wide * parameter.shape[-1] ** -0.5, generator=generator)


def _logits(model: Any, cache: Any, after_prompt: Callable[[], None] | None = None) -> torch.Tensor:
    """The logits of the new tokens, (rows, NEW, vocabulary). `after_prompt` is called between prompt and first
    token."""
    ids = torch.randint(5, VOCAB - 8, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 0, 0
    # The same tokens whatever the model says: a difference stays a difference of logits.
    forced = torch.randint(5, VOCAB - 8, (2, NEW), generator=torch.Generator().manual_seed(3))
    steps = 0

    def force(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        if steps == 0 and after_prompt is not None:
            after_prompt()
        chosen = torch.full_like(scores, -1e9)
        chosen[torch.arange(2), forced[:, steps]] = 0.0
        steps += 1
        return chosen

    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=transformers.LogitsProcessorList([force]),
        **vattn.transformers.cache_argument(cache),
    )
    return torch.stack(out.logits, dim=1).float()


def _vattn_cache(model: Any) -> Any:
    return vattn.transformers.VattnCache(model.config, max_seq_len=512, max_batch_size=2)


def _held(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if isinstance(layer, vattn.transformers.VattnLayer)]


def _check_cache(model: Any, expected: torch.Tensor, result: Result) -> None:
    try:
        cache = _vattn_cache(model)
    except ValueError as error:
        result.cache_refused = _text(error)
        return
    try:
        logits = _logits(model, cache)
    except Exception as error:
        result.cache_error = _text(error)
        return
    result.cache_difference = _difference(logits, expected)
    held = _held(cache)
    result.layers, result.held = len(cache.layers), len([layer for layer in held if layer.get_seq_length()])
    result.others = dict(collections.Counter(type(layer).__name__ for layer in cache.layers if layer not in held))
    for index in range(len(held)):
        damaged = _vattn_cache(model)

        def damage(cache: Any = damaged, index: int = index) -> None:
            keys = _held(cache)[index].keys
            if keys is not None:
                keys[DAMAGED_ROW, :, DAMAGED_TOKEN] = 3 - 4 * keys[DAMAGED_ROW, :, DAMAGED_TOKEN]

        result.damage_difference = _difference(_logits(model, damaged, damage), expected)
        if result.damage_difference:
            return


def _check_attention(model: Any, result: Result) -> None:
    """Loading with "vattn", switching to it, and its logits beside those of "eager"."""
    seen: set[str] = set()

    def counted(*args: Any, **kwargs: Any) -> Any:
        result.attention_calls += 1
        seen.update(name for name, value in kwargs.items() if value is not None)
        return attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("vattn", counted)
    try:
        config = copy.deepcopy(model.config)
        config._attn_implementation = "vattn"
        switched = type(model)(config).eval()
        switched.load_state_dict(model.state_dict())
        switched.generation_config = model.generation_config
        model.set_attn_implementation("eager")
        expected = _logits(model, transformers.DynamicCache(config=model.config))
        refused = result.cache_refused or result.cache_error
        cache = transformers.DynamicCache(config=switched.config) if refused else _vattn_cache(switched)
        logits = _logits(switched, cache)
        result.attention_difference, result.magnitude = _difference(logits, expected), float(expected.abs().max())
    except ValueError as error:
        if 'attn_implementation="vattn"' not in str(error):
            result.attention_error = _text(error)
        else:
            result.attention_refused = _text(error)
    except Exception as error:
        result.attention_error = _text(error)
    finally:
        transformers.AttentionInterface.register("vattn", attention_forward)
        result.keywords = sorted(seen)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
