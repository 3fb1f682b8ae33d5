"""Every tiny family is at parity with real vLLM on the CPU, and every point is accounted for."""

from __future__ import annotations

import pytest

from paritykit.testing import TINY_FAMILIES, tiny_model
from tests.integration.conftest import Bench

WORST = 1e-5


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_family_is_at_parity_in_float32(bench: Bench, family: str) -> None:
    results = bench.compare(tiny_model(family))
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0, [c.unmatched for c in results.coverage]
    assert all(u.reason for c in results.coverage for u in c.skipped)
    measured = [f for f in results.findings if f.check != "tokens"]
    worst = max(measured, key=lambda f: f.metrics["rel_max"] or 0.0)
    assert (worst.metrics["rel_max"] or 0.0) < WORST, worst
    assert {f.positions for f in measured if f.case == "long-200"} == {(0, 206)}


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_dense_family_passes_in_bfloat16(bench: Bench, family: str) -> None:
    results = bench.compare(tiny_model(family), dtype="bfloat16")
    assert results.summary.verdict == "pass", results.summary
    assert {f.allowed_source for f in results.findings if f.check == "modules"} == {
        "fallback table, bfloat16 (no noise floor measured)"
    }


def test_routing_in_bfloat16_is_not_called_a_failure(bench: Bench) -> None:
    results = bench.compare(tiny_model("mixtral"), dtype="bfloat16", checks=["modules"])
    assert results.summary.verdict in ("pass", "inconclusive")
    assert results.summary.failed == 0


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_two_ranks_are_joined(bench: Bench, family: str) -> None:
    results = bench.compare(tiny_model(family), tensor_parallel_size=2)
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0
    joined = next(f for f in results.findings if f.point.endswith("layers.0.self_attn.o_proj#input"))
    assert "rank 1" in joined.mapping
