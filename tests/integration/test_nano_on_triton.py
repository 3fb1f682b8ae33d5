"""Whole models of nano with the Triton backend, at every point against nano with torch on the CPU.

Triton's interpreter runs the kernels on the CPU; where there is a GPU, whole models run there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import paritykit as pk
from paritykit.testing import tiny_model
from tests.attention import HAVE_TRITON

Reference = Callable[..., pk.Capture]
CASES = [
    pk.Case(id="long", tokens=tuple((11 * k + 5) % 499 for k in range(40)), new_tokens=8),
    pk.Case(id="one", tokens=(498,), new_tokens=3),
    pk.Case(id="seven", tokens=tuple((11 * k + 5) % 499 for k in range(7)), new_tokens=4),
]
INTERPRETED: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks of 3, chunks of 17, fp8": ("gemma2", {"block_size": 3, "max_num_batched_tokens": 17, "kv_dtype": "fp8"}),
    "two ranks of contiguous caches": ("qwen2", {"tensor_parallel_size": 2, "kv": "contiguous"}),
}
ON_GPU: dict[str, tuple[str, dict[str, Any]]] = {
    "blocks of 3, chunks of 17": ("gemma2", {"block_size": 3, "max_num_batched_tokens": 17}),
    "contiguous": ("gemma2", {"kv": "contiguous"}),
    "every kind of layer": ("gemma3", {"block_size": 16}),
    "preemption": ("qwen3", {"block_size": 4, "num_blocks": 13, "max_num_batched_tokens": 64}),
    "prefix caching": ("llama", {"block_size": 4, "enable_prefix_caching": True, "max_num_batched_tokens": 17}),
    "experts": ("mixtral", {"block_size": 1}),
    "two ranks": ("qwen2", {"tensor_parallel_size": 2, "kv": "contiguous"}),
    "two ranks on one GPU": ("gemma2", {"device": "cuda:0", "tensor_parallel_size": 2, "block_size": 3}),
}
pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(scope="module")
def reference() -> Reference:
    """nano with torch, on one rank: made once for each model, cache dtype and device."""
    known: dict[tuple[str, str, str], pk.Capture] = {}

    def capture(family: str, *, kv_dtype: str = "auto", device: str = "cpu", **_: Any) -> pk.Capture:
        key = (family, kv_dtype, device)
        if key not in known:
            engine = pk.engine("nano", str(small(family)), kv_dtype=kv_dtype, device=device, attention_backend="torch")
            known[key] = pk.capture(engine, cases=CASES)
        return known[key]

    return capture


def small(family: str) -> Path:
    """As few layers as have one of each kind."""
    return tiny_model(family, num_hidden_layers=3 if family == "gemma3" else 2)


def assert_parity(known: pk.Capture, family: str, **arguments: Any) -> None:
    engine = pk.engine("nano", str(small(family)), **arguments)
    run = pk.compare(reference=known, candidate=pk.capture(engine, cases=CASES, follow=known))
    assert run.results.run.candidate.attention_backend == "triton"
    assert run.summary.verdict == "pass", run.summary
    assert (run.summary.unmatched, run.summary.skipped) == (0, 0), run.results.coverage
    assert {f.case for f in run.results.findings if f.point == "model.layers.1.self_attn"} == {c.id for c in CASES}


@pytest.mark.parametrize(("family", "arguments"), INTERPRETED.values(), ids=INTERPRETED)
def test_a_model_by_the_interpreter(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, family: str, arguments: dict[str, Any]
) -> None:
    known = reference(family, **arguments)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert_parity(known, family, attention_backend="triton", **arguments)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("family", "arguments"), ON_GPU.values(), ids=ON_GPU)
def test_a_model_on_a_gpu(reference: Reference, family: str, arguments: dict[str, Any]) -> None:
    assert_parity(reference(family), family, **{"device": "cuda", **arguments})


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_on_a_gpu(reference: Reference, dtype: str) -> None:
    assert_parity(reference("gemma2"), "gemma2", device="cuda", dtype=dtype)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_a_model_with_an_fp8_cache_on_a_gpu(reference: Reference, kv: str) -> None:
    """Against torch on the same GPU: what the last bit of a CPU's sum differs by may round to another fp8 number."""
    known = reference("qwen2", kv_dtype="fp8", device="cuda")
    assert_parity(known, "qwen2", kv_dtype="fp8", device="cuda", kv=kv, max_num_batched_tokens=17)
