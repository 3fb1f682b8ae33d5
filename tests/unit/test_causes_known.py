"""What checks of weights and files name by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from paritykit.diagnose.known import cause_of, named, weights_of
from paritykit.results import Coverage
from paritykit.verdict import summarise
from tests.made import finding

GATE, QUERY = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("fields", "name"), [
    ({"metric": "unread"}, "weight-not-loaded"),
    ({"metric": "unread", "shape": [64, 64], "metrics": {"unread": 1.0}}, "weight-corrupt"),
    ({"metric": "wrong-order"}, "rows-permuted"),
    ({"metric": "wrong-order", "message": "axis 0 is out of order on rank 1"}, "tp-shard"),
    ({"metric": "wrong-order", "message": "landed in part several of it", "mapping": "w on rank 1"}, "tp-shard"),
    ({"metric": "wrong-slice", "message": "w landed in model.layers.1.self_attn.q_proj"}, "weight-shared-wrongly"),
    ({"metric": "value-changed"}, "weight-corrupt"),
    ({"metric": "scale"}, "scale-factor"),
    ({"metric": "offset"}, "weight-corrupt"),
    ({"metric": "layers-disagree"}, ""),
])  # fmt: skip
def test_a_problem_of_a_weight_is_a_cause(fields: dict[str, Any], name: str) -> None:
    assert cause_of(finding(QUERY, "fail", check="weights", **fields)) == name


@pytest.mark.parametrize(("tensor", "metric", "name"), [
    (GATE, "wrong-order", "gate-up-swapped"),
    ("model.layers.0.mlp.experts.3.w1.weight", "wrong-slice", "moe-routing"),
    ("model.layers.0.input_layernorm.weight", "offset", "norm-offset"),
    ("model.layers.0.self_attn.q_proj.bias", "unread", "bias-missing"),
    ("lm_head.weight", "unread", "lm-head"),
])  # fmt: skip
def test_which_tensor_it_is_decides(tensor: str, metric: str, name: str) -> None:
    assert cause_of(finding(tensor, "fail", check="weights", metric=metric)) == name


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(("tensor", "metric", "message", "name"), [
    (HEAD, "tie-mismatch", "tie_word_embeddings is false, but the checkpoint has no lm_head.weight", "lm-head"),
    (EMBEDDING, "tie-mismatch", f"the checkpoint has {HEAD} but no {EMBEDDING}; it is true", "weight-not-loaded"),
    (HEAD, "tie-mismatch", f"{HEAD} is stored beside {EMBEDDING}; they differ", "weight-shared-wrongly"),
    (EMBEDDING, "shape-mismatch", "x: stored as [496, 96], but Config makes it [499, 96]", "vocab-shard"),
    (EMBEDDING, "shape-mismatch", "x: stored as [499, 64], but Config makes it [499, 96]", ""),
    (EMBEDDING, "shape-mismatch", "x: stored as [496, 64], but Config makes it [499, 96]", ""),
    (QUERY, "shape-mismatch", "x: stored as [64, 96], but Config makes it [96, 96]", ""),
])  # fmt: skip
def test_what_files_lack_is_a_cause(tensor: str, metric: str, message: str, name: str) -> None:
    assert cause_of(finding(tensor, "fail", check="checkpoint", metric=metric, message=message)) == name


def test_a_head_that_is_not_read_because_it_is_tied_is_shared() -> None:
    unread = finding("lm_head.weight", "fail", check="weights", metric="unread")
    tied = finding("model.embed_tokens.weight", "fail", check="weights", metric="tied-wrongly")
    assert [f.causes[0].name for f in named([unread, tied])] == ["weight-shared-wrongly"] * 2


def test_what_only_differs_after_other_requests_is_stale() -> None:
    warm = finding("l.1", "fail", check="prefix_cache", condition="after 32 of its 40 tokens", origin="introduced")
    later = finding("l.2", "fail", check="prefix_cache", origin="inherited", order=1)
    cold = finding("l.1", "pass")
    found = named([cold, warm, later])
    assert [[c.name for c in f.causes] for f in found] == [[], ["kv-stale"], []]
    assert "after 32 of its 40 tokens" in found[1].causes[0].evidence


@pytest.mark.parametrize("other", ["modules", "chunking"])
def test_what_differs_in_other_ways_too_is_not_said_to_be_stale(other: str) -> None:
    warm = finding("l.1", "fail", check="prefix_cache", origin="introduced")
    assert not any(f.causes for f in named([warm, finding("l.1", "fail", check=other)]))


def test_what_passes_and_other_checks_are_left_as_they_are() -> None:
    findings = [finding(QUERY, "pass", check="weights"), finding("model.norm", "fail", metric="rel_l2")]
    assert named(findings) == findings


def test_the_weights_of_a_module_are_found_by_the_references_names() -> None:
    found = named([finding("w1", "fail", check="weights", metric="unread"), finding(QUERY, "fail", check="weights")])
    assert [c.name for c in weights_of(found, "mlp.experts", {"w1": "mlp.experts.gate_up_proj"})] == [
        "weight-not-loaded"
    ]
    assert weights_of(found, "mlp", {"w1": "mlp.experts.gate_up_proj"}) == []


def test_the_summary_shows_the_causes_of_the_first_divergence() -> None:
    found = named([finding(QUERY, "fail", check="weights", case="", metric="unread", message="not read")])
    covered = Coverage(check="weights", points=1, compared=1)
    summary = summarise(["weights"], [covered], found, min_coverage=0.5)
    assert [c.name for c in summary.causes] == ["weight-not-loaded"]
    assert summary.causes[0].evidence == "check weights: not read"
