"""nano's rotary embedding against transformers': frequencies of every kind, halves and pairs, partial heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CohereConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from paritykit.engines.nano.rope import Rope, read_ropes
from paritykit.engines.nano.rotary import Rotary, frequencies
from paritykit.engines.nano.step import Chunk, Plan, Step

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "truncate": False,
    },
    "yarn-fixed": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
}
HEAD_DIM, LIMIT, THETA = 64, 256, 5000.0


def config_of(scaling: dict[str, Any], **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=LIMIT,
        rope_parameters={"rope_theta": THETA, **scaling},
        **changes,
    )


def rope_of(scaling: dict[str, Any], **changes: Any) -> Rope:
    fields = {"max_position_embeddings": LIMIT, "rope_parameters": {"rope_theta": THETA, **scaling}, **changes}
    return read_ropes(fields, head_dim=HEAD_DIM, theta=1e4, local_theta=None)["full_attention"]


def step_of(length: int, prompt: int | None = None) -> Step:
    chunk = Chunk(tokens=[0] * length, start=0, table=[0], prompt=prompt or length, sample=True)
    return Step.make(Plan([chunk]), block_size=1024, device=torch.device("cpu"))


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    for length in (10, LIMIT, LIMIT + 1, 1000):
        kind = SCALINGS[name]["rope_type"]
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config_of(SCALINGS[name]), seq_len=length)
        rope = rope_of(SCALINGS[name])
        torch.testing.assert_close(frequencies(rope, length), expected, rtol=3e-7, atol=0)
        assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ["default", *SCALINGS])
def test_rotation_is_that_of_llama(name: str) -> None:
    scaling = SCALINGS.get(name, {"rope_type": "default"})
    length = 300 if name == "dynamic" else 200
    query, key = torch.randn(2, length, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config_of(scaling))(query, torch.arange(length)[None])
    expected = modeling_llama.apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    actual = Rotary(rope_of(scaling))(query, key, step_of(length))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e[0], rtol=0, atol=2e-6)


def test_neighbours_are_paired_as_in_cohere() -> None:
    query, key = torch.randn(2, 50, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    config = CohereConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, rope_parameters={"rope_theta": THETA, "rope_type": "default"}
    )
    cos, sin = modeling_cohere.CohereRotaryEmbedding(config)(query, torch.arange(50)[None])
    expected = modeling_cohere.apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    actual = Rotary(rope_of({"rope_type": "default"}, rope_interleaved=True))(query, key, step_of(50))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e[0], rtol=0, atol=1e-6)
    halves = Rotary(rope_of({"rope_type": "default"}))(query, key, step_of(50))
    assert (halves[0] - actual[0]).abs().max() > 0.5


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_leaves_the_rest_alone(interleaved: bool) -> None:
    rope = rope_of({"rope_type": "default", "partial_rotary_factor": 0.25}, rope_interleave=interleaved)
    query = torch.randn(9, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    turned, _ = Rotary(rope)(query, query, step_of(9))
    assert rope.dim == 16
    assert torch.equal(turned[..., 16:], query[..., 16:])
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))
    config = config_of({"rope_type": "default", "partial_rotary_factor": 0.25})
    expected, _ = ROPE_INIT_FUNCTIONS["linear"](
        config_of({"rope_type": "linear", "factor": 1.0, "partial_rotary_factor": 0.25})
    )
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    torch.testing.assert_close(frequencies(rope), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_keys_than_queries_are_turned_alike(dtype: torch.dtype) -> None:
    rotary = Rotary(rope_of({"rope_type": "default"}))
    query = torch.randn(9, 4, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned, key = rotary(query, query[:, 1:2], step_of(9))
    assert (turned.shape, turned.dtype) == (query.shape, dtype)
    assert torch.equal(key, turned[:, 1:2])


def test_dynamic_scaling_does_not_depend_on_the_schedule() -> None:
    """A position is rotated for the prompt's length, or its own place after the prompt, whatever the chunk."""
    rotary = Rotary(rope_of(SCALINGS["dynamic"]))
    query = torch.randn(300, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    whole, _ = rotary(query, query, step_of(300))
    parts = []
    for start in range(0, 300, 70):
        chunk = Chunk(tokens=[0] * len(query[start : start + 70]), start=start, table=[0], prompt=300, sample=False)
        step = Step.make(Plan([chunk]), block_size=1024, device=torch.device("cpu"))
        parts.append(rotary(query[start : start + 70], query[start : start + 70], step)[0])
    assert torch.equal(torch.cat(parts), whole)


def test_cos_and_sin_are_made_once_a_step() -> None:
    rotary, step = Rotary(rope_of({"rope_type": "default"})), step_of(3)
    calls = []
    table = rotary.table
    rotary.table = lambda *a: calls.append(1) or table(*a)  # type: ignore[method-assign,func-returns-value]
    for _ in range(3):
        rotary(torch.ones(3, 1, HEAD_DIM), torch.ones(3, 1, HEAD_DIM), step)
    assert calls == [1]
