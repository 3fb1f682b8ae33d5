"""Architectures that nobody wrote a line for: their ledgers are complete, and their modules find each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paritykit.engines.checkpoint import Checkpoint
from paritykit.ledger.judge import judge_weights
from paritykit.results import Results
from paritykit.runner import compare_captures, weight_subject
from paritykit.testing import tiny_model
from tests.integration.conftest import Bench
from tests.integration.strangers import make


def compared(bench: Bench, model: Path, **arguments: Any) -> Results:
    reference = bench.reference(model, names=("short", "long-40"))
    results = compare_captures(reference, bench.candidate(model, reference, **arguments))
    subject = weight_subject(bench.ledgers[str(model)], Checkpoint.find(str(model)), dtype="float32")
    judged = judge_weights(subject)
    assert [f for f in judged.findings if f.verdict not in ("pass", "skip")] == []
    return results


@pytest.mark.parametrize("kind", [
    "gpt_neox", "olmo2", "granite", "phi", "falcon",
    *(pytest.param(k, marks=pytest.mark.deep) for k in ("stablelm", "starcoder2")),
])  # fmt: skip
def test_stranger_is_at_parity_without_any_rule(bench: Bench, tmp_path: Path, kind: str) -> None:
    results = compared(bench, make(kind, tmp_path / kind))
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0, [c.unmatched for c in results.coverage]


@pytest.mark.parametrize("kind", ["deepseek_v2", pytest.param("deepseek_v3", marks=pytest.mark.deep)])
def test_latent_attention_maps(bench: Bench, tmp_path: Path, kind: str) -> None:
    """vLLM's rotary kernel for CPUs is wrong for the shapes of latent attention: found, and nowhere but there."""
    results = compared(bench, make(kind, tmp_path / kind), attention_backend="CPU_MLA")
    assert [u for c in results.coverage for u in c.unmatched if u.side == "reference"] == []
    introduced = {f.located for f in results.findings if f.check == "modules" and f.origin == "introduced"}
    first = results.summary.first_divergence
    assert first is not None
    assert first.point == "model.layers.0.self_attn"
    assert introduced <= {f"model.layers.{n}.self_attn" for n in range(3)}
    shown = next(f for f in results.findings if f.point == first.seen_at and f.case == "long-40")
    assert shown.failing[0][0] == 1
    (cause, *_) = results.summary.causes
    assert (cause.name, cause.confidence > 0.9) == ("position-shift", True)
    assert "at the distance of heads in memory" in cause.evidence


@pytest.mark.deep
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_config_that_does_not_say_how_experts_are_scored(bench: Bench, tmp_path: Path, scoring: str) -> None:
    """vLLM takes softmax then, and transformers, whose config has no such key, the sigmoid it was trained with."""
    model = make("deepseek_v3", tmp_path / scoring, scoring_func=scoring)
    rotary = {"compilation_config": {"custom_ops": ["none"]}}
    results = compared(bench, model, attention_backend="CPU_MLA", **rotary)
    if scoring == "sigmoid":
        assert results.summary.verdict == "pass", results.summary
        return
    first = results.summary.first_divergence
    assert first is not None
    assert first.point == "model.layers.1.mlp"
    (cause, *_) = results.summary.causes
    assert cause.name == "moe-scale"
    assert "with shares by softmax" in cause.evidence


@pytest.mark.deep
@pytest.mark.parametrize("theta", [None, 50.0])
def test_a_compiled_graph_is_compared_where_it_shows(bench: Bench, tmp_path: Path, theta: float | None) -> None:
    """At the cache, the logits and the tokens; a fault inside it shows there too."""
    changed = {} if theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    model = tiny_model("qwen2")
    reference = bench.reference(model, names=("short", "long-40"))
    results = compare_captures(reference, bench.candidate(model, reference, enforce_eager=False, hf_overrides=changed))
    assert results.summary.verdict == ("pass" if theta is None else "fail"), results.summary
    assert results.summary.unmatched == 0
    assert {f.check for f in results.findings} == {"modules", "logits", "tokens"}
