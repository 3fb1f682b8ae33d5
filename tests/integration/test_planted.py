"""A mistake planted in one layer of real vLLM is reported at that layer, at the right point; a null one is not."""

from __future__ import annotations

from typing import Any

import pytest

from paritykit.testing import tiny_model
from tests.integration.conftest import Bench

LAYER = 2
PLACES = {
    "rope_theta": "model.layers.2.self_attn",
    "norm_eps": "model.layers.2.input_layernorm",
    "gate_up_swapped": "model.layers.2.mlp.gate_proj",
    "v_bias_dropped": "model.layers.2.self_attn.v_proj",
    "attention_scale": "model.layers.2.self_attn",
    "residual_dropped": "model.layers.2",
    "lm_head_permuted": "lm_head",
}
MODELS: dict[str, dict[str, Any]] = {"qwen2": {}, "gemma2": {"attention_bias": True}}


@pytest.mark.parametrize("fault", PLACES)
@pytest.mark.parametrize("family", MODELS)
def test_fault_is_reported_where_it_is(bench: Bench, family: str, fault: str) -> None:
    model = tiny_model(family, **MODELS[family])
    results = bench.compare(model, after_load=f"tests.integration.planted:{fault}", after_load_args={"layer": LAYER})
    first = results.summary.first_divergence
    assert results.summary.verdict == "fail"
    assert first is not None
    assert (first.point, first.origin) == (PLACES[fault], "introduced")
    introduced = {f.located for f in results.findings if f.check == "modules" and f.origin == "introduced"}
    expected = {PLACES[fault]} | ({"model.layers.2.mlp.up_proj"} if fault == "gate_up_swapped" else set())
    assert introduced == expected


@pytest.mark.parametrize("family", MODELS)
def test_null_fault_changes_nothing(bench: Bench, family: str) -> None:
    model = tiny_model(family, **MODELS[family])
    clean = bench.compare(model)
    null = bench.compare(model, after_load="tests.integration.planted:nothing", after_load_args={"layer": LAYER})
    assert clean.summary.verdict == null.summary.verdict == "pass"
    assert [f.value for f in clean.findings] == [f.value for f in null.findings]
