"""The ledger of real vLLM's weights: complete on clean models, at one rank and at two, and each planted fault named."""

from __future__ import annotations

import pytest

from paritykit.ledger.judge import Judged
from paritykit.testing import TINY_FAMILIES, tiny_config, tiny_model
from paritykit.testing.faults import FAULTS, Fault
from tests.faulty import MODELS
from tests.integration.conftest import Yard

LAYER = "model.layers.2"
ATTENTION, MLP = f"{LAYER}.self_attn", f"{LAYER}.mlp"
EXPERTS = f"{LAYER}.block_sparse_moe.experts"


def failing(judged: Judged) -> dict[str, str]:
    return {f.point: f.metric for f in judged.findings if f.verdict == "fail"}


QUICK = ("mixtral",)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.deep) for f in TINY_FAMILIES]
)
def test_two_ranks_together_hold_every_element(yard: Yard, family: str) -> None:
    judged = yard.load(tiny_model(family), ranks=2)
    assert [f for f in judged.findings if f.verdict != "pass"] == []
    assert judged.coverage.compared == judged.coverage.points
    assert {r.rank for r in judged.rows} == {0, 1}


@pytest.mark.deep
def test_a_kv_head_on_both_ranks_is_no_fault(yard: Yard) -> None:
    judged = yard.load(tiny_model("qwen2", num_key_value_heads=1), ranks=2)
    assert failing(judged) == {}
    held = [(r.rank, r.source) for r in judged.rows if r.tensor == f"{ATTENTION}.k_proj.weight"]
    assert held == [(0, "[:, :]"), (1, "[:, :]")]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.deep)])
def test_digits_fit_half_precision(yard: Yard, dtype: str) -> None:
    judged = yard.load(tiny_model("qwen2", dtype=dtype), dtype=dtype)
    assert failing(judged) == {}


@pytest.mark.parametrize(("fault", "family", "wanted"), [
    ("weight-not-loaded", "qwen2",
     {f"{ATTENTION}.k_proj.weight": "unread", f"{ATTENTION}.qkv_proj.weight": "unwritten"}),
    ("bias-not-loaded", "qwen2", {f"{ATTENTION}.v_proj.bias": "unread", f"{ATTENTION}.qkv_proj.bias": "unwritten"}),
    ("gate-and-up-exchanged", "qwen2",
     {f"{MLP}.gate_proj.weight": "wrong-order", f"{MLP}.up_proj.weight": "wrong-order"}),
    ("key-rows-permuted", "qwen2", {f"{ATTENTION}.k_proj.weight": "wrong-order"}),
    ("norm-offset-baked-in", "gemma2", {f"{LAYER}.input_layernorm.weight": "offset"}),
    ("embedding-scaled-in-file", "gemma2", {"model.embed_tokens.weight": "scale"}),
    ("square-weight-transposed", "qwen2", {f"{ATTENTION}.o_proj.weight": "wrong-transpose"}),
    ("experts-exchanged", "mixtral",
     {f"{EXPERTS}.1.w1.weight": "wrong-slice", f"{EXPERTS}.3.w1.weight": "wrong-slice"}),
    ("head-overwritten", "qwen2", {"lm_head.weight": "unread", "model.embed_tokens.weight": "tied-wrongly"}),
    ("value-corrupt", "qwen2", {f"{MLP}.down_proj.weight": "unread"}),
    ("value-corrupt-in-use", "qwen2", {f"{MLP}.down_proj.weight": "value-changed"}),
    ("null-loading", "qwen2", {}),
])  # fmt: skip
def test_planted_fault_is_named(yard: Yard, fault: str, family: str, wanted: dict[str, str]) -> None:
    assert failing(yard.load(tiny_model(family), fault=fault)) == wanted


def test_swapped_q_and_k_are_named(yard: Yard) -> None:
    judged = yard.load(tiny_model("llama", num_key_value_heads=4), fault="queries-and-keys-exchanged")
    assert failing(judged) == {f"{ATTENTION}.k_proj.weight": "wrong-order", f"{ATTENTION}.q_proj.weight": "wrong-order"}


@pytest.mark.parametrize(("fault", "wanted"), [
    ("shard-of-rank-0", {f"{MLP}.down_proj.weight": "wrong-slice"}),
    pytest.param("key-rows-permuted", {f"{ATTENTION}.k_proj.weight": "wrong-order"}, marks=pytest.mark.deep),
    pytest.param(
        "weight-not-loaded", {f"{ATTENTION}.k_proj.weight": "unread", f"{ATTENTION}.qkv_proj.weight": "unwritten"},
        marks=pytest.mark.deep,
    ),
])  # fmt: skip
def test_planted_fault_of_two_ranks_is_named(yard: Yard, fault: str, wanted: dict[str, str]) -> None:
    judged = yard.load(tiny_model("qwen2"), ranks=2, fault=fault)
    assert failing(judged) == wanted
    if fault == "weight-not-loaded":
        told = next(f.message for f in judged.findings if f.metric == "unwritten")
        assert "qkv_proj.weight[64:96, :] on rank 0 is never written" in told


LOADING = [f for _, f in FAULTS.items() if f.stage == "loading" and "vllm" in f.engines and f.kind != "null"]


@pytest.mark.deep
@pytest.mark.parametrize("fault", LOADING, ids=[f.name for f in LOADING])
def test_every_loading_fault_of_the_table_is_found(yard: Yard, fault: Fault) -> None:
    name = next(n for n, (family, more) in MODELS.items() if 2 in fault.layers(tiny_config(family, **more)))
    family, more = MODELS[name]
    judged = yard.load(tiny_model(family, **more), ranks=fault.when.ranks, fault=fault.name)
    assert failing(judged)
