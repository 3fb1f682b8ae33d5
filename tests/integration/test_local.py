"""Local errors everywhere: a small mistake that the free run's noise hides is found, and a clean engine passes."""

from __future__ import annotations

import pytest

from paritykit.plan import make_plan
from paritykit.results import Results
from paritykit.testing import tiny_model
from paritykit.testing.faults import find


def run(dtype: str, *, fault: str = "") -> Results:
    plan = make_plan(
        str(tiny_model("qwen2")),
        given={"candidate": "nano", "dtype": dtype},
        checks=("modules", "logits"),
        case_names=("long-40",),
        engine_args=find(fault).arguments(layer=3, strength=0.4) if fault else {},
        local=True,
    )
    with plan.open() as session:
        return session.results(plan.checks)


@pytest.mark.xdist_group("local")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_clean_engine_passes_and_every_point_has_a_local_error(dtype: str) -> None:
    results = run(dtype)
    assert results.summary.verdict == "pass", results.summary
    assert not results.summary.culprits
    told = [f.local for f in results.findings if f.local is not None]
    assert len(told) > 0.9 * len(results.findings)
    assert all("draws" in local.allowed_source for local in told if local.allowed_source and local.metric == "rel_l2")


@pytest.mark.xdist_group("local")
def test_a_small_mistake_in_the_last_layer_is_found_in_half_precision() -> None:
    """It does less there than bfloat16 has done to the layer's input."""
    results = run("bfloat16", fault="attention-scale")
    first = results.summary.first_divergence
    assert first is not None
    assert (first.point, first.origin) == ("model.layers.3.self_attn", "introduced")
    assert {c.point for c in results.summary.culprits} == {"model.layers.3.self_attn"}
