"""Names of tiny models with fields: what is named is what is built, and what cannot be is told."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.errors import UnknownNameError, UsageError
from paritykit.models import resolve_model
from paritykit.options import read_value
from paritykit.testing import TinyModel, tiny_config
from paritykit.testing.named import read_name
from paritykit.testing.names import folder_of

ROPE = "rope_parameters"
WORDS = st.from_regex(r"[a-z_][a-z_0-9.-]{0,12}", fullmatch=True).filter(lambda text: read_value(text) == text)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
FIELDS = st.dictionaries(st.sampled_from(["vocab_size", "hidden_act", "invented"]), SCALARS | st.lists(SCALARS))


@given(FIELDS, st.none() | st.integers())
def test_a_name_says_its_fields(fields: dict[str, Any], seed: int | None) -> None:
    fields = fields if seed is None else {**fields, "seed": seed}
    model = TinyModel.of("llama", fields)
    assert model.fields == fields
    assert [type(v) for v in model.fields.values()] == [type(v) for _, v in sorted(fields.items())]
    assert TinyModel(str(model)) == model
    assert shlex.split(str(model)) == [str(model)] == [shlex.quote(str(model))]


def test_fields_in_any_order_are_one_model() -> None:
    one, other = TinyModel("tiny:qwen2,seed=3,dtype=bfloat16"), TinyModel("tiny:qwen2,dtype=bfloat16,seed=3")
    assert one == other
    assert hash(one) == hash(other)
    assert one != TinyModel("tiny:qwen2")
    assert TinyModel("tiny:qwen2").config == tiny_config("qwen2")


def test_an_entry_is_set_and_the_others_stay() -> None:
    config = TinyModel(f"tiny:gemma3,{ROPE}.full_attention.factor=8.0,{ROPE}.full_attention.rope_type=linear").config
    plain = tiny_config("gemma3")
    assert config[ROPE]["full_attention"] == {**plain[ROPE]["full_attention"], "rope_type": "linear", "factor": 8.0}
    assert config[ROPE]["sliding_attention"] == plain[ROPE]["sliding_attention"]
    assert tiny_config("gemma3") == plain


def test_an_entry_is_set_in_the_table_that_was_given() -> None:
    table = {"rope_type": "default", "rope_theta": 1.0}
    config = tiny_config("llama", **{f"{ROPE}.rope_theta": 2.0, ROPE: table})
    assert config[ROPE] == {"rope_type": "default", "rope_theta": 2.0}
    assert table["rope_theta"] == 1.0


def test_the_model_that_was_named_is_built() -> None:
    found = resolve_model("tiny:gpt2,num_hidden_layers=1,seed=5,dtype=bfloat16")
    assert (found.config["n_layer"], found.dtype) == (1, "bfloat16")
    assert str(found.path) == folder_of("tiny:gpt2,seed=5,dtype=bfloat16,num_hidden_layers=1")
    assert found.path != resolve_model("tiny:gpt2,num_hidden_layers=1").path
    assert folder_of("somewhere/else,seed=5") == "somewhere/else,seed=5"


def test_a_list_may_have_one_item_or_none() -> None:
    assert read_name("tiny:qwen3_moe,mlp_only_layers=2/")[1] == {"mlp_only_layers": [2]}
    assert read_name("tiny:qwen3_moe,mlp_only_layers=/")[1] == {"mlp_only_layers": []}
    assert TinyModel.of("qwen3_moe", {"mlp_only_layers": []}).config["mlp_only_layers"] == []


@pytest.mark.parametrize(("name", "said"), [
    ("qwen2", "'qwen2' is not the name of a tiny model"),
    ("tiny:qwen", "unknown tiny model family 'qwen'; did you mean 'qwen"),
    ("tiny:qwen2?seed=1", "unknown tiny model family 'qwen2.seed=1'; did you mean 'qwen2'"),
    ("tiny:qwen2,", "'' is not of the form FIELD=VALUE"),
    ("tiny:qwen2,seed", "'seed' is not of the form FIELD=VALUE"),
    ("tiny:qwen2,seed=", "'seed=' is not of the form FIELD=VALUE"),
    ("tiny:qwen2,3=3", "'3=3' is not of the form FIELD=VALUE"),
    ("tiny:qwen2,seed=1,seed=2", "seed is set twice"),
    ("tiny:qwen2,seed=one", "seed must be an integer, not 'one'"),
    ("tiny:qwen2,seed=true", "seed must be an integer, not True"),
    ("tiny:qwen2,path=/somewhere", "tiny model 'qwen2' has no field 'path' to set"),
    ("tiny:qwen2,family=llama", "tiny model 'qwen2' has no field 'family' to set"),
    ("tiny:qwen2,model_type=llama", "model_type of tiny model 'qwen2' cannot be overridden"),
    ('tiny:qwen2,hidden_act={"a":1}', "cannot be part of a tiny model's name"),
    ("tiny:qwen2,hidden_act=$(true)", "cannot be part of a tiny model's name"),
    (f"tiny:llama,{ROPE}.rope_teta=1.0", "unknown entry .* 'rope_teta'; did you mean 'rope_theta'"),
    ("tiny:llama,rope_parameter.rope_theta=1.0", "unknown table .* 'rope_parameter'; did you mean 'rope_parameters'"),
    ("tiny:llama,vocab_size.rope_theta=1.0", "unknown table .* 'vocab_size'"),
    (f"tiny:gemma3,{ROPE}.full.rope_theta=1.0", "unknown table .* 'full'"),
])  # fmt: skip
def test_a_name_that_cannot_be_is_told(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TinyModel(name)


@pytest.mark.parametrize(("name", "said"), [
    ("tiny:qwen2,hiden_size=64", "unknown config field .* 'hiden_size'; did you mean 'hidden_size'"),
    ("tiny:qwen2,dtype=bfloat", "unknown tiny model dtype 'bfloat'; did you mean 'bfloat16'"),
    ("tiny:qwen2,num_attention_heads=3", "'qwen2': its config cannot be built"),
    ("tiny:llama,num_attention_heads=3", "'llama': its config cannot be built"),
    ("tiny:llama,vocab_size=many", "'llama': its config cannot be built"),
    ("tiny:mixtral,num_experts_per_tok=9", "'mixtral': its config cannot be built"),
    (f"tiny:llama,{ROPE}.partial_rotary_factor=0.5,{ROPE}.factor=2.0,{ROPE}.rope_type=linear", "its config cannot be"),
    (f"tiny:llama,{ROPE}.rope_type=lineer", "unknown rope_type .* 'lineer'; did you mean 'linear'"),
    (f"tiny:gemma3,{ROPE}.full_attention.rope_type=1/", "unknown rope_type"),
    (f"tiny:llama,{ROPE}.rope_type=linear", "'llama': its config cannot be built"),
])  # fmt: skip
def test_a_model_that_cannot_be_built_is_told(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TinyModel(name).build()


def test_a_value_that_json_cannot_hold_is_told() -> None:
    with pytest.raises(UsageError, match="hidden_act=<object"):
        TinyModel.of("llama", {"hidden_act": object()})
    with pytest.raises(UnknownNameError, match="unknown tiny model family"):
        TinyModel.of("lama")
    assert json.dumps(TinyModel("tiny:llama").config)
