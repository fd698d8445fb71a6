"""A model's geometry from its config.json: the fields as Hugging Face writes them, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vattn.tools.cli import main
from vattn.tools.geometry import Geometry
from vattn.tools.model_config import of_fields, read_config

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
QWEN3 = {**LLAMA, "num_hidden_layers": 36, "head_dim": 128, "hidden_size": 2560, "dtype": "bfloat16"}
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}
FALCON = {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544, "multi_query": True}
DEEPSEEK = {
    **LLAMA,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
GEMMA3 = {
    "model_type": "gemma3",
    "dtype": "bfloat16",
    "vision_config": {"num_hidden_layers": 27},
    "text_config": {
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": 2560,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
}
QWEN3_NEXT = {**LLAMA, "num_hidden_layers": 48, "num_key_value_heads": 2, "head_dim": 256, "full_attention_interval": 4}
JAMBA = {**LLAMA, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16}
NEMOTRON_H = {**LLAMA, "num_hidden_layers": 9, "hybrid_override_pattern": "M-M*M-M*-", "ssm_state_size": 128}
GPT_OSS = {**LLAMA, "layer_types": ["sliding_attention", "full_attention"] * 12, "num_hidden_layers": 24}
T5 = {"is_encoder_decoder": True, "num_decoder_layers": 6, "num_layers": 12, "num_heads": 8, "d_kv": 64, "d_model": 512}
MPT = {"n_layers": 4, "n_heads": 8, "d_model": 512, "attn_config": {"kv_n_heads": 2}}


@pytest.mark.parametrize(
    ("fields", "geometry", "notes"),
    [
        (LLAMA, (32, 8, 128, None), []),
        (QWEN3, (36, 8, 128, None), []),
        ({**LLAMA, "num_key_value_heads": None}, (32, 32, 128, None), []),
        (GPT2, (12, 12, 64, None), []),
        (MPT, (4, 2, 64, None), []),
        (FALCON, (32, 1, 64, None), []),
        ({**FALCON, "num_kv_heads": 8, "new_decoder_architecture": True}, (32, 8, 64, None), []),
        (DEEPSEEK, (61, 1, 576, 0), ["latent"]),
        ({**DEEPSEEK, "index_head_dim": 128}, (61, 1, 576, 0), ["latent", "index_head_dim=128"]),
        (GEMMA3, (34, 4, 256, None), ["parts beside", "29 layers look only 1,024 tokens back"]),
        ({**LLAMA, "sliding_window": 4096}, (32, 8, 128, None), ["32 layers look only 4,096"]),
        ({**LLAMA, "sliding_window": 4096, "use_sliding_window": False}, (32, 8, 128, None), []),
        (GPT_OSS, (24, 8, 128, None), ["12 layers look only a window back"]),
        (QWEN3_NEXT, (12, 2, 256, None), ["36 of 48 layers keep no tokens"]),
        (JAMBA, (4, 8, 128, None), ["28 of 32"]),
        (NEMOTRON_H, (2, 8, 128, None), ["7 of 9"]),
        ({**LLAMA, "model_type": "falcon_h1", "mamba_d_state": 256}, (32, 8, 128, None), ["32 layers keep a state"]),
        ({**LLAMA, "num_kv_shared_layers": 10}, (22, 8, 128, None), ["10 layers read the keys of earlier"]),
        ({**LLAMA, "head_dim": 192, "v_head_dim": 128}, (32, 8, 192, 128), []),
        (T5, (6, 8, 64, None), ["decoder"]),
        ({**LLAMA, "torch_dtype": "float64"}, (32, 8, 128, None), ["dtype='float64'"]),
    ],
)
def test_the_numbers_and_what_they_leave_out(
    fields: dict[str, Any], geometry: tuple[int, int, int, int | None], notes: list[str]
) -> None:
    found = of_fields(fields)
    assert found.geometry == Geometry(*geometry)
    assert len(found.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, found.notes, strict=True))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "none of num_decoder_layers"),
        ({"num_hidden_layers": 4}, "none of hidden_size"),
        ({**LLAMA, "num_hidden_layers": 0}, "or it is 0"),
        ({**LLAMA, "num_hidden_layers": "32"}, "num_hidden_layers='32' is not a number"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers=True is not a number"),
        ({**LLAMA, "num_key_value_heads": [8, 4]}, "num_key_value_heads has a value a layer"),
        ({**LLAMA, "hidden_size": 4097}, "4097 elements"),
        ({**LLAMA, "head_dim": 256, "global_head_dim": 512}, "global_head_dim=512 beside 256"),
        ({**LLAMA, "head_dim": 256, "per_layer_config": {"05": {"head_dim": 512}}}, r"per_layer_config\[05\].*512"),
        ({**LLAMA, "block_configs": [{}]}, "block_configs"),
        ({"model_type": "mamba", "num_hidden_layers": 4, "hidden_size": 8}, "none of its layers keeps keys"),
        ({**LLAMA, "layer_types": ["mamba"] * 32}, "no layer keeps keys"),
        ({**LLAMA, "mamba_d_state": 16}, "nothing says which"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        of_fields(fields)


def test_a_file_and_its_folder_give_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3))
    plans = []
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", "--config", str(path), "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]
    assert (plans[0]["model"], plans[0]["num_layers"], plans[0]["head_dim"]) == ("gemma3", 34, 256)
    assert "upper bound" in plans[0]["notes"][1]
    assert main(["plan", "--config", str(tmp_path), "--num-layers", "5"]) == 0
    out = capsys.readouterr().out
    assert "gemma3, changed: 5 layers" in out
    assert "upper bound" in " ".join(out.split())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "holds list"),
        (b"{}", "none of num_decoder_layers"),
        (b'{"num_hidden_layers": 1, "per_layer_config": []}', "none of hidden_size"),
        (b'{"layer_types": ["full_attention"], "head_dim": 64, "num_attention_heads": -1}', "num_attention_heads=-1"),
    ],
)
def test_a_file_that_is_none_is_one_line_and_status_2(
    content: bytes, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert main(["plan", "--config", str(tmp_path / "config.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vattn: error: argument --config: ")
    assert problem in err
    assert err.count("\n") == 1


def test_a_path_that_is_not_there_and_two_models_at_once_are_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(tmp_path)]) == 2
    assert "a folder without a config.json" in capsys.readouterr().err
    assert main(["plan", "--config", str(tmp_path / "no")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["plan", "--config", str(tmp_path), "--model", "llama-3-8b"]) == 2
    assert "give either --model or --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma2", "mistral", "gpt2", "gpt_neox", "phi3", "deepseek_v3", "gpt_oss", "opt"]
)
def test_what_transformers_writes_is_what_its_own_cache_holds(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path)
    found = read_config(str(tmp_path)).geometry
    assert found.num_layers == len(transformers.DynamicCache(config=config).layers)
    if model_type != "deepseek_v3":
        heads = config.num_attention_heads
        assert found.num_kv_heads == (getattr(config, "num_key_value_heads", None) or heads)
        assert found.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)
