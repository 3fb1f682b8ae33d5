"""nano reads config.json of every architecture it knows, in old and new spelling, and says what it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.config import NanoConfig
from paritykit.errors import UnknownNameError, UsageError
from paritykit.testing import tiny_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 499,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def read(**changes: Any) -> NanoConfig:
    return NanoConfig.read({**LLAMA, **changes})


def windows(config: NanoConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_llama_and_its_defaults() -> None:
    config = read()
    assert (config.head_dim, config.kv_heads, config.scale) == (24, 2, 24**-0.5)
    assert not any((config.qkv_bias, config.output_bias, config.mlp_bias, config.tied))
    assert config.experts is None
    assert config.layers[0].rope.theta == 10000.0
    assert read(attention_bias=True).output_bias
    assert read(num_key_value_heads=None).kv_heads == 4


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("MistralForCausalLM", {"sliding_window": 7}, [7] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("MistralForCausalLM", {}, [4096] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 7, "use_sliding_window": False}, [None] * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 7],
        ),
        ("Qwen3MoeForCausalLM", {"sliding_window": 7, "num_experts": 4, "num_experts_per_tok": 2}, [None] * 4),
        ("Gemma2ForCausalLM", {"sliding_window": 7}, [7, None, 7, None]),
        ("Gemma3ForCausalLM", {"sliding_window": 7, "sliding_window_pattern": 3}, [7, 7, None, 7]),
        ("LlamaForCausalLM", {"sliding_window": 7}, [None] * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 7, "layer_types": ["sliding_attention"] + ["full_attention"] * 3},
            [7, None, None, None],
        ),
    ],
)
def test_windows(architecture: str, changes: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(read(architectures=[architecture], **changes)) == expected


def test_old_and_new_spelling_of_rope_agree() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = read(rope_theta=5e5, rope_scaling={**scaling, "original_max_position_embeddings": 64})
    new = read(rope_parameters={**scaling, "rope_theta": 5e5, "original_max_position_embeddings": 64})
    older = read(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert old.layers == new.layers
    assert (older.layers[0].rope.kind, older.layers[0].rope.factor) == ("linear", 2.0)


def test_gemma3_has_a_rope_for_each_kind_of_layer() -> None:
    old = read(
        architectures=["Gemma3ForCausalLM"],
        rope_theta=2e5,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = read(
        architectures=["Gemma3ForCausalLM"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
        num_hidden_layers=6,
    )
    assert old.layers[0] == new.layers[0]
    full = new.layers[5].rope
    assert (full.kind, full.theta, full.factor) == ("linear", 2e5, 8.0)
    assert (new.layers[0].rope.kind, new.layers[0].rope.theta) == ("default", 5e3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mixtral", "qwen3_moe", "qwen3", "mistral"])
def test_tiny_families(family: str) -> None:
    fields = json.loads((tiny_model(family) / "config.json").read_text())
    config = NanoConfig.read(fields)
    assert config.architecture.model_type == fields["model_type"]
    assert (config.attention_softcap, config.final_softcap) == ((5.0, 3.0) if family == "gemma2" else (None, None))
    assert [layer.sparse for layer in config.layers[:2]] == {
        "mixtral": [True, True],
        "qwen3_moe": [True, False],
    }.get(family, [False, False])
    without_architecture = {k: v for k, v in fields.items() if k != "architectures"}
    assert NanoConfig.read(without_architecture) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalML"]}, "did you mean 'Qwen2ForCausalLM'"),
        ({"architectures": None, "model_type": "gpt2"}, "unknown architecture for engine 'nano': 'gpt2'"),
        ({"rope_scaling": {"type": "longrope"}}, "unknown kind of rotary scaling 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rotary scaling 'linear' needs factor"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 kv heads evenly"),
        ({"layer_types": ["full_attention"]}, "layer_types must name full_attention or sliding_attention"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types must name full_attention or sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "nano reads plain weights only"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok 3 is more than the 2 experts",
        ),
    ],
)
def test_what_it_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(**changes)


def test_a_language_model_inside_another_is_not_taken_for_one_alone(tmp_path: Path) -> None:
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**LLAMA, "model_type": "gemma3_text"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match="'Gemma3ForConditionalGeneration'; did you mean 'Gemma3ForCausalLM'"):
        NanoConfig.of(Checkpoint(tmp_path))


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="Gemma3ForCausalLM") as caught:
        read(architectures=["GPT2LMHeadModel"])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "tensor_parallel_size must be at least 1"),
        (3, "tensor_parallel_size 3 does not divide the model's 4 attention heads"),
        (8, "tensor_parallel_size 8 does not divide the model's 4 attention heads"),
    ],
)
def test_ranks_that_cannot_share(size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read().check_parallel(size)
    read().check_parallel(4)


def test_ranks_that_cannot_share_kv_heads_or_widths() -> None:
    with pytest.raises(UsageError, match="neither divides nor is a multiple of the 3 kv heads"):
        read(num_attention_heads=6, num_key_value_heads=3).check_parallel(2)
    with pytest.raises(UsageError, match="does not divide the intermediate size 191"):
        read(intermediate_size=191).check_parallel(2)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 63}
    with pytest.raises(UsageError, match="does not divide the intermediate size 63"):
        read(architectures=["Qwen3MoeForCausalLM"], **experts).check_parallel(2)
