"""VattnCache with layers that share a tensor, as on cuda by default: DynamicCache's tokens, whatever the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import generate, model_of, prompt
from vattn.transformers import VattnCache

OPTIONS: list[dict[str, Any]] = [{}, {"dense": True}, {"layers_per_tensor": "all"}]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "vattn"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers_that_share_a_tensor_give_the_tokens_of_a_dynamic_cache(attention: str, options: dict[str, Any]) -> None:
    model = model_of("llama", attention)
    layers = model.config.num_hidden_layers
    assert layers > 1
    if options.get("layers_per_tensor") == "all":
        options = {"layers_per_tensor": layers}
    expected = generate(model, prompt(rows=2), num_beams=2)
    with VattnCache(model.config, max_seq_len=64, max_batch_size=4, **options) as cache:
        found = generate(model, prompt(rows=2), cache, num_beams=2)
        (held,) = cache.kv_caches
        assert held.layers_per_tensor == options.get("layers_per_tensor", 1)
        assert held.layout == ("HND" if held.layers_per_tensor == 1 else "NHD")
        assert torch.equal(found, expected)
