"""No model's attention is changed in silence: every keyword that reaches the vattn attention is honoured, known to
change nothing, or refused."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from hf_models import model_of, prompt
from vattn.transformers import attention_keywords as keywords
from vattn.transformers.attention import attention_forward

KNOWN = {*keywords.HONOURED, *keywords.HARMLESS, *keywords.REFUSED}


def given_by_the_models():
    """Every keyword in a call of an attention function in the installed transformers, and a file that has it."""
    root = Path(transformers.__file__).parent
    found = {}
    for path in root.glob("models/*/modeling_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and "attention_interface" in ast.unparse(node.func):
                found.update({keyword.arg: path.name for keyword in node.keywords if keyword.arg})
    return found


def test_every_keyword_that_a_model_of_the_installed_release_gives_is_in_the_table():
    found = given_by_the_models()
    assert {"scaling", "sliding_window", "s_aux", "softcap", "indices", "position_bias"} <= set(found)  # it did look
    assert {name: file for name, file in found.items() if name not in KNOWN} == {}


def test_every_keyword_of_transformers_own_lists_is_in_the_table():
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils import TransformersKwargs

    assert {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__} - KNOWN == set()


def test_what_is_honoured_is_a_parameter_and_what_is_not_is_none():
    parameters = {*inspect.signature(attention_forward).parameters} - {"module", "kwargs"}
    assert parameters == set(keywords.HONOURED)
    assert not {*keywords.HARMLESS, *keywords.REFUSED} & parameters
    assert not {*keywords.HARMLESS} & {*keywords.REFUSED}
    assert all(keywords.HARMLESS.values())


def attend(**given):
    query = torch.randn(1, 2, 3, 8)
    return attention_forward(torch.nn.Module(), query, query, query, None, **given)[0]


@pytest.mark.parametrize("name", keywords.REFUSED)
def test_a_keyword_that_cannot_be_honoured_is_refused(name):
    with pytest.raises(ValueError, match=rf'attn_implementation="vattn" does not support {name} .*; .*"eager"'):
        attend(**{name: torch.zeros(1, 3, 2)})
    attend(**{name: None})


@pytest.mark.parametrize(
    ("value", "kind"),
    [(torch.zeros(2, 3), r"a Tensor of shape \(2, 3\)"), (2.5, "2.5"), (True, "True"), ([1], "a list"), (0, "0")],
)
def test_a_keyword_unknown_to_it_is_refused_and_named(value, kind):
    with pytest.raises(ValueError, match=rf"does not support tilt .*unknown.* the model gives {kind}; .*eager"):
        attend(tilt=value)


def test_a_keyword_unknown_to_it_that_says_nothing_is_not():
    attend(tilt=None, yaw=False)


def test_a_refusal_does_not_print_a_tensor():
    with pytest.raises(ValueError, match="does not support tilt") as caught:
        attend(tilt=torch.full((1000,), 7.0))
    assert len(str(caught.value)) < 400


def test_keywords_that_change_nothing_change_nothing():
    torch.manual_seed(0)
    expected = attend()
    torch.manual_seed(0)
    assert torch.equal(attend(**dict.fromkeys(keywords.HARMLESS, 1)), expected)


def test_a_keyword_that_a_user_gives_to_the_model_is_refused_too():
    model = model_of("llama", "vattn")
    with pytest.raises(ValueError, match="does not support tilt"):
        model(prompt(), tilt=torch.zeros(1))


def test_what_a_trainer_gives_is_not_refused():
    model_of("llama", "vattn")(prompt(), labels=prompt(), num_items_in_batch=torch.tensor(17), use_cache=False)


def sparse(attention):
    """A model whose indexer picks four keys for each query."""
    config = transformers.DeepseekV32Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        index_topk=4,
        index_head_dim=16,
        index_n_heads=2,
        first_k_dense_replace=0,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_a_sparse_attention_is_refused_instead_of_run_dense():
    sparse("eager")(prompt())
    with pytest.raises(ValueError, match=r"does not support indices \(the keys that a sparse attention selects"):
        sparse("vattn")(prompt())
