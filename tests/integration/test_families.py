"""Every tiny family is at parity with real vLLM on the CPU, and every point is accounted for."""

from __future__ import annotations

import msgspec
import pytest
from transformers import AutoConfig

from paritykit.captures.manifest import CACHE_PORTS, Manifest
from paritykit.captures.reader import Capture
from paritykit.engines.checkpoint import Checkpoint
from paritykit.ledger.judge import judge_weights
from paritykit.mapping.build import build_mapping
from paritykit.runner import weight_subject
from paritykit.testing import TINY_FAMILIES, tiny_model
from tests.integration.conftest import Bench

WORST = 1e-5
WINDOW = 16
"""Sliding layers of the tiny models see as much; what a cache holds behind it may be gone."""


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_family_is_at_parity_in_float32(bench: Bench, family: str) -> None:
    results = bench.compare(tiny_model(family))
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0, [c.unmatched for c in results.coverage]
    assert all(u.reason for c in results.coverage for u in c.skipped)
    measured = [f for f in results.findings if f.check != "tokens"]
    worst = max(measured, key=lambda f: f.metrics["rel_max"] or 0.0)
    assert (worst.metrics["rel_max"] or 0.0) < WORST, worst
    long = {f.point: f.positions for f in measured if f.case == "long-200"}
    caches = {point for point in long if point.rpartition("#")[2] in CACHE_PORTS}
    assert len(caches) == 2 * AutoConfig.from_pretrained(tiny_model(family)).num_hidden_layers
    assert {long[point] for point in long.keys() - caches} == {(0, 206)}
    assert {long[point] for point in caches} <= {(0, 206), (206 - WINDOW + 1, 206)}
    judged = judge_weights(
        weight_subject(
            bench.ledgers[str(tiny_model(family))], Checkpoint.find(str(tiny_model(family))), dtype="float32"
        )
    )
    assert [f for f in judged.findings if f.verdict != "pass"] == []


@pytest.mark.parametrize(("family", "ranks"), [
    *((f, 1) for f in ("qwen2", "gemma2", "mixtral", "qwen3_moe", "phi3", "gpt2", "opt")),
    pytest.param("mixtral", 2, marks=pytest.mark.deep),
    pytest.param("gpt2", 2, marks=pytest.mark.deep),
])  # fmt: skip
def test_weights_alone_say_what_the_engine_declares(bench: Bench, family: str, ranks: int) -> None:
    """No rule by name: the same map follows from where the weights landed."""
    reference = bench.reference(tiny_model(family), names=("short",))
    candidate = bench.candidate(tiny_model(family), reference, tensor_parallel_size=ranks)
    declared, traced = (
        build_mapping(reference.manifest, without(candidate, *facts))
        for facts in (("landings",), ("names", "packed", "fused"))
    )
    assert traced.misfits == []
    assert {r.reference: (r.candidate, r.blocks) for r in declared.rules}.items() <= {
        r.reference: (r.candidate, r.blocks) for r in traced.rules
    }.items()
    both = build_mapping(reference.manifest, candidate.manifest)
    assert both.disagreements == []
    assert sum(r.source == "weight provenance" for r in both.rules) > len(both.rules) / 2


def without(capture: Capture, *facts: str) -> Manifest:
    kept = {k: v for k, v in capture.manifest.facts.items() if k not in facts}
    return msgspec.structs.replace(capture.manifest, facts=kept)


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


@pytest.mark.parametrize("family", ["gemma2", *(pytest.param(f, marks=pytest.mark.deep) for f in ("qwen2", "phi3"))])
def test_two_ranks_are_joined(bench: Bench, family: str) -> None:
    results = bench.compare(tiny_model(family), tensor_parallel_size=2)
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0
    joined = next(f for f in results.findings if f.point.endswith("layers.0.self_attn.o_proj#input"))
    assert "rank 1" in joined.mapping
