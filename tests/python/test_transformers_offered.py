"""`attn_implementation="vattn"` is refused, at once, for a model that would never call it or wants other masks."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from hf_models import PAD, generate, model_of, prompt

_SIZES = {"hidden_size": 32, "vocab_size": 96, "pad_token_id": PAD}

OLD = {
    "falcon": lambda: transformers.FalconConfig(**_SIZES, num_hidden_layers=1, num_attention_heads=2),
    "mpt": lambda: transformers.MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=96),
    "bloom": lambda: transformers.BloomConfig(**_SIZES, n_layer=1, n_head=2),
    "xglm": lambda: transformers.XGLMConfig(vocab_size=96, d_model=32, ffn_dim=32, num_layers=1, attention_heads=2),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_SIZES, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ),
}


@pytest.fixture(params=OLD)
def old(request):
    """A configuration of a model whose attention is not looked up by name."""
    return OLD[request.param]()


def refused(model=r"\w+", why="has an attention of its own"):
    return pytest.raises(ValueError, match=rf'attn_implementation="vattn": {model} {why}.*VattnCache works')


def test_building_a_model_of_the_old_kind_is_refused(old):
    with refused():
        transformers.AutoModelForCausalLM.from_config(old, attn_implementation="vattn")


def test_a_configuration_that_asks_for_it_is_refused(old):
    kind = type(transformers.AutoModelForCausalLM.from_config(old))
    old._attn_implementation = "vattn"
    with refused(kind.__name__):
        kind(old)


def test_loading_a_model_of_the_old_kind_is_refused(old, tmp_path):
    transformers.AutoModelForCausalLM.from_config(old).save_pretrained(tmp_path)
    with refused():
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="vattn")


def test_switching_a_model_of_the_old_kind_is_refused_and_changes_nothing(old):
    model = transformers.AutoModelForCausalLM.from_config(old).eval()
    before = model.config._attn_implementation
    with refused(type(model).__name__):
        model.set_attn_implementation("vattn")
    with refused(type(model).__name__):
        model.set_attn_implementation({"": "vattn"})
    assert model.config._attn_implementation == before
    model(prompt())


def test_other_implementations_are_left_to_transformers(old):
    model = transformers.AutoModelForCausalLM.from_config(old, attn_implementation="eager")
    model.set_attn_implementation("sdpa")  # transformers logs that nothing changes
    with pytest.raises(ValueError, match=r'Specified `attn_implementation="nonsense"` is not supported'):
        transformers.AutoModelForCausalLM.from_config(old, attn_implementation="nonsense")


def test_a_model_that_does_sums_with_masks_of_eager_is_refused():
    # DeepSeek V4 appends columns to its mask: to one of True and False they would mean the opposite.
    config = transformers.DeepseekV4Config(
        **_SIZES, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, n_routed_experts=4
    )
    with refused("DeepseekV4ForCausalLM", 'does not offer "sdpa"'), torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="vattn")


def test_a_model_without_attention_is_not_refused():
    config = transformers.MambaConfig(**_SIZES, num_hidden_layers=1)
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation="vattn")


def composite():
    """A vision model whose tower has an attention of the old kind, around a Llama-like text model."""
    text = {**_SIZES, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"intermediate_size": 32, "model_type": "qwen2", "eos_token_id": None}
    vision = {"hidden_size": 32, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32}
    return transformers.GotOcr2Config(text_config=text, vision_config=vision)


def test_a_part_of_a_composite_model_may_use_it():
    kind = transformers.GotOcr2ForConditionalGeneration
    with refused("GotOcr2ForConditionalGeneration"):
        kind._from_config(composite(), attn_implementation="vattn")
    ids = prompt()
    torch.manual_seed(0)
    plain = kind._from_config(composite()).eval()
    torch.manual_seed(0)
    model = kind._from_config(composite(), attn_implementation={"text_config": "vattn"}).eval()
    assert model.config.text_config._attn_implementation == "vattn"
    assert (model(ids).logits - plain(ids).logits).abs().max() < 1e-4
    plain.set_attn_implementation({"text_config": "vattn"})
    assert plain.config.text_config._attn_implementation == "vattn"


def test_what_transformers_wraps_keeps_its_name_and_is_wrapped_once():
    from vattn.transformers import offered
    from vattn.transformers.attention import register

    before = transformers.PreTrainedModel.set_attn_implementation
    register()
    assert transformers.PreTrainedModel.set_attn_implementation is before
    assert before.__name__ == "set_attn_implementation"
    assert not hasattr(before.__wrapped__, "__wrapped__")
    assert offered.refusal(model_of("llama"), "vattn") == ""


def test_every_family_that_is_let_in_without_sdpa_exists_and_offers_none():
    from vattn.transformers.offered import WITHOUT_SDPA

    for name in WITHOUT_SDPA:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        models = [model for model in vars(module).values() if isinstance(model, type)]
        own = [model for model in models if issubclass(model, transformers.PreTrainedModel)]
        own = [model for model in own if model.__module__ == module.__name__]
        assert own, name
        assert not all(model._supports_sdpa for model in own), f"{name} offers sdpa now: take it from the list"


def test_a_model_that_is_let_in_generates():
    assert generate(model_of("gemma3", "vattn"), prompt()).shape[0] == 1
