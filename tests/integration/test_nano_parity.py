"""nano against Hugging Face through ParityKit's own runner: every point of every family, in every way of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import paritykit as pk
from paritykit.captures.manifest import CACHE_PORTS
from paritykit.captures.recorder import Selection
from paritykit.config import load_config
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.engines.nano.paged import PagedCache
from paritykit.results import Results
from paritykit.runner import compare_captures
from paritykit.testing import tiny_model
from tests.nano import one_thread

FAMILIES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"]
LAYERS = {"gemma3": 3}
WORST = 1e-5
DECODE_STEPS = 32
CASES = [
    pk.Case(id="long", tokens=tuple((11 * k + 5) % 499 for k in range(45)), new_tokens=DECODE_STEPS + 1),
    pk.Case(id="one", tokens=(498,), new_tokens=3),
]
CONDITIONS: dict[str, dict[str, Any]] = {
    "contiguous": {"kv": "contiguous"},
    "blocks of 1": {"block_size": 1},
    "blocks of 3": {"block_size": 3},
    "blocks of 16": {"block_size": 16},
    "blocks of 32": {"block_size": 32},
    "chunks of 9": {"max_num_batched_tokens": 9},
    "token by token": {"max_num_batched_tokens": 1},
    "preemption": {"block_size": 4, "num_blocks": 20, "max_num_batched_tokens": 64},
    "prefix caching": {"block_size": 4, "enable_prefix_caching": True},
}
RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "two ranks": (2, {"tensor_parallel_size": 2, "block_size": 3, "max_num_batched_tokens": 37}),
    "more ranks than kv heads": (1, {"tensor_parallel_size": 2, "block_size": 16, "kv": "paged"}),
    "ranks of contiguous caches": (2, {"tensor_parallel_size": 2, "kv": "contiguous"}),
}
Compare = Callable[..., Results]
IN_CI = {("qwen2", "two ranks"), ("gemma2", "two ranks"), ("mixtral", "more ranks than kv heads")}


def marked(family: str, condition: str, *, quick: bool) -> Any:
    return pytest.param(family, condition, marks=() if quick else pytest.mark.deep)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def model_of(family: str, kv_heads: int = 2) -> Path:
    """Two layers, or as many as it takes to have one of each kind."""
    return tiny_model(family, num_hidden_layers=LAYERS.get(family, 2), num_key_value_heads=kv_heads)


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pk.Capture]:
    """The reference's capture of a family, made once."""
    folder, known = tmp_path_factory.mktemp("references"), dict[Path, pk.Capture]()

    def capture(family: str, kv_heads: int = 2) -> pk.Capture:
        model = model_of(family, kv_heads)
        if model not in known:
            engine = HFEngine(str(model))
            engine.open()
            known[model] = engine.run(CASES, points=Selection(), out=folder / model.name)
            engine.close()
        return known[model]

    return capture


@pytest.fixture
def compare(captures: Callable[..., pk.Capture], tmp_path: Path) -> Iterator[Compare]:
    engines: list[NanoEngine] = []

    def run(family: str, *, kv_heads: int = 2, **arguments: Any) -> Results:
        reference = captures(family, kv_heads)
        engines.append(NanoEngine(str(model_of(family, kv_heads)), provenance=False, **arguments))
        engines[-1].open()
        fed = [c.force(reference.generated(c.id)) for c in CASES]
        capture = engines[-1].run(fed, points=Selection(), out=tmp_path / f"capture{len(engines)}")
        return compare_captures(reference, capture, config=load_config({}, environ={}))

    yield run
    for engine in engines:
        engine.close()


def assert_parity(results: Results, *, positions: tuple[int, int] | None = (0, 76)) -> None:
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.unmatched == 0, [c.unmatched for c in results.coverage]
    assert all(u.reason for c in results.coverage for u in c.skipped)
    measured = [f for f in results.findings if f.check != "tokens"]
    worst = max(measured, key=lambda f: f.metrics["rel_max"] or 0.0)
    assert (worst.metrics["rel_max"] or 0.0) < WORST, worst
    if positions is not None:
        assert {f.positions for f in measured if f.case == "long"} == {positions}


@pytest.mark.parametrize("family", FAMILIES)
def test_family(compare: Compare, family: str) -> None:
    results = compare(family, block_size=3, max_num_batched_tokens=37)
    assert_parity(results)
    skipped = {u.point.rpartition(".")[2].partition("@")[0]: u.reason for c in results.coverage for u in c.skipped}
    assert set(skipped) <= {"rotary_emb", "embed_tokens", "act_fn", "attn"}
    assert {f"model.layers.1.self_attn#{p}" for p in CACHE_PORTS} <= {f.point for f in results.findings}


@pytest.mark.parametrize(
    ("family", "condition"), [marked(f, c, quick=f == "gemma3") for f in FAMILIES for c in CONDITIONS]
)
def test_condition(compare: Compare, family: str, condition: str) -> None:
    assert_parity(compare(family, **CONDITIONS[condition]))


@pytest.mark.parametrize(
    ("family", "condition"), [marked(f, c, quick=(f, c) in IN_CI) for f in FAMILIES for c in RANKS]
)
def test_ranks(compare: Compare, family: str, condition: str) -> None:
    kv_heads, arguments = RANKS[condition]
    results = compare(family, kv_heads=kv_heads, **arguments)
    assert_parity(results)
    joined = {f.point: f.mapping for f in results.findings}
    assert "rank 1" in joined["model.layers.0.self_attn.q_proj"]
    assert ("rank 1" in joined["model.layers.0.self_attn.k_proj"]) is (kv_heads > 1)


def test_prefix_caching_reads_what_is_cached_and_shows_every_position(captures: Any, tmp_path: Path) -> None:
    reference = captures("gemma2")
    engine = NanoEngine(str(model_of("gemma2")), enable_prefix_caching=True, block_size=4, provenance=False)
    engine.open()
    fed = [c.force(reference.generated(c.id)) for c in CASES]
    cold = [msgspec.structs.replace(c, id=f"{c.id} cold") for c in fed]
    cases = [*cold, *(msgspec.structs.replace(c, batch=1) for c in fed)]
    capture = engine.run(cases, points=Selection(), out=tmp_path / "clean")
    assert_parity(compare_captures(reference, capture, config=load_config({}, environ={})))

    def spoil(_: str, batch: int, batches: int) -> None:
        assert batches == 2
        for cache in engine.llm.team.worker.caches if batch else ():
            assert isinstance(cache, PagedCache)
            cache.values.data[: len(cache.values.data) // 2] *= 1.5

    spoilt = engine.run(cases, points=Selection(), out=tmp_path / "spoilt", progress=spoil)
    results = compare_captures(reference, spoilt, config=load_config({}, environ={}))
    assert results.summary.first_divergence is not None
    assert results.summary.first_divergence.point == "model.layers.0.self_attn"
    engine.close()


def test_half_precision_passes(compare: Compare) -> None:
    assert compare("qwen2", dtype="bfloat16").summary.verdict == "pass"


def test_a_fault_is_found_where_it_is(compare: Compare) -> None:
    results = compare("gemma2", after_load="tests.integration.test_nano_parity:swap_gate_and_up")
    first = results.summary.first_divergence
    assert results.summary.verdict == "fail"
    assert first is not None
    assert (first.point, first.origin) == ("model.layers.1.mlp.gate_proj", "introduced")


def swap_gate_and_up(worker: Any) -> None:
    layer = worker.model.model.layers[1].mlp.gate_up_proj
    layer.forward = lambda x: torch.cat(type(layer).forward(layer, x).chunk(2, dim=-1)[::-1], dim=-1)
