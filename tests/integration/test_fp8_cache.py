"""A KV cache of 8 bits rounds by itself: held against draws that keep theirs so, and a fault beside it is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paritykit.plan import make_plan
from paritykit.results import Results
from paritykit.testing import tiny_model
from paritykit.testing.faults import find

CACHE_OF = {"nano": {"kv_dtype": "fp8"}, "vllm": {"kv_cache_dtype": "fp8"}}
CACHED = {f"model.layers.{n}.self_attn#{kind}_cache" for n in range(4) for kind in ("key", "value")}
deep = pytest.mark.deep


def run(engine: str, dtype: str, **arguments: Any) -> Results:
    if engine == "vllm" and not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM has no kernel for an fp8 cache on a CPU without AVX-512 or AMX")
    plan = make_plan(
        str(tiny_model("qwen2")),
        given={"candidate": engine, "dtype": dtype},
        checks=("modules", "logits", "tokens"),
        case_names=("short", "long-40"),
        engine_args=CACHE_OF[engine] | arguments,
    )
    with plan.open() as session:
        return session.results(plan.checks)


@pytest.mark.xdist_group("fp8-cache")
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("nano", "bfloat16"), ("vllm", "bfloat16"), *(pytest.param(e, "float32", marks=deep) for e in CACHE_OF)],
)
def test_a_clean_engine_passes_and_its_cache_is_read(engine: str, dtype: str) -> None:
    results = run(engine, dtype)
    assert results.summary.verdict == "pass", results.summary
    assert {f.point for f in results.findings if f.verdict == "pass"} >= CACHED
    kept = [f for f in results.findings if f.point in CACHED]
    assert all("draws" in f.allowed_source for f in kept)
    first = [f.metrics["rel_l2"] or 0.0 for f in kept if f.point.startswith("model.layers.0.")]
    assert all(0.01 < value < 0.1 for value in first), "an fp8 cache rounds, and no more than that"


@pytest.mark.xdist_group("fp8-cache")
@pytest.mark.parametrize("fault", ["kv-scale-unread", "rope-theta"])
def test_a_fault_beside_its_rounding_is_found(fault: str) -> None:
    results = run("nano", "bfloat16", **find(fault).arguments(layer=1))
    first = results.summary.first_divergence
    assert first is not None
    assert (first.point, first.origin) == ("model.layers.1.self_attn", "introduced"), results.summary
