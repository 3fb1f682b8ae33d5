"""A watched KV cache: of clean engines there is nothing to tell, however they run; faults of slots are, by place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.engines.nano.core import NanoLLM
from paritykit.engines.nano.engine import NanoEngine
from paritykit.engines.process import ProcessEngine
from paritykit.engines.strays import Watched
from paritykit.testing import tiny_model
from paritykit.testing.faults import find, planted
from tests.faulty import VOCABULARY, homes, model_of
from tests.nano import one_thread

CASES = ("len-36+3@b", "len-5+3", "len-1+2", "len-37+4@b")
CONDITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks of one": {"block_size": 1},
    "blocks of three in chunks": {"block_size": 3, "max_num_batched_tokens": 7, "max_num_seqs": 4},
    "preemption": {"num_blocks": 5},
    "contiguous": {"kv": "contiguous"},
    "fp8": {"kv_dtype": "fp8"},
    "prefixes": {"enable_prefix_caching": True, "block_size": 4},
}
LAYER = "model.layers.1.self_attn"
EXPECTED = {
    "kv-write-lost": ("lost", LAYER),
    "kv-slot-off-at-block-start": ("lost", LAYER),
    "kv-offset-not-advanced": ("foreign", LAYER),
    "kv-padding-writes": ("foreign", LAYER),
    "block-freed-early": ("shared", "model.layers.0.self_attn"),
}


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


Watch = Callable[..., Watched]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    numbers = itertools.count()

    def watched(engine: Any, cases: list[pk.Case]) -> Watched:
        import msgspec

        engine.poison_cache(3e4)
        capture = engine.run(cases, points=Selection(()), out=tmp_path / f"{next(numbers)}")
        return msgspec.convert(capture.manifest.facts["cache"], Watched)

    return watched


def one_after_the_other(cases: list[pk.Case]) -> list[pk.Case]:
    return [pk.Case(id=f"{c.id}~", tokens=c.tokens, new_tokens=c.new_tokens, batch=n) for n, c in enumerate(cases, 1)]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_quiet_on_clean_nano(watch: Watch, condition: str) -> None:
    engine = NanoEngine(str(tiny_model("gemma2", num_hidden_layers=2)), provenance=False, **CONDITIONS[condition])
    engine.open()
    cases = pk.cases(*CASES).resolve(vocab_size=499)
    seen = watch(engine, [*cases, *one_after_the_other(cases)])
    assert (seen.strays, seen.unwatched) == ([], {})
    assert seen.layers == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert seen.steps >= 16


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_quiet_on_two_ranks_and_seen_on_each(watch: Watch, kind: str) -> None:
    fault, size = find("kv-write-lost"), dict[str, Any]({kind: 2})
    engine = NanoEngine(str(model_of("qwen2")), provenance=False, **size)
    engine.open()
    try:
        cases = fault.when.cases(vocab_size=VOCABULARY)
        assert watch(engine, cases).strays == []
        with planted(engine, fault, layer=2):
            strays = watch(engine, cases).strays
        assert {s.layer for s in strays} == {"model.layers.2.self_attn"}
        assert {s.rank for s in strays} == ({0, 1} if kind == "tensor_parallel_size" else {1})
    finally:
        engine.close()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fault_of_slots_is_told_with_its_place(watch: Watch, name: str) -> None:
    fault = find(name)
    engine = NanoEngine(str(model_of(next(iter(homes(fault))))), provenance=False, **fault.when.arguments)
    engine.open()
    cases = fault.when.cases(vocab_size=VOCABULARY)
    with planted(engine, fault, layer=1):
        strays = watch(engine, cases).strays
    assert (strays[0].kind, strays[0].layer) == EXPECTED[name]
    assert {s.layer for s in strays} == {strays[0].layer}
    assert watch(engine, cases).strays == []


def test_copies_on_write_are_no_strays_and_given_up_blocks_are_filled_again() -> None:
    with NanoLLM(tiny_model("qwen2", num_hidden_layers=2), block_size=4) as llm:
        worker = llm.team.worker
        worker.poison(3e4)
        parent = llm.add_request(tuple(range(9, 20)), max_tokens=5)
        llm.step()
        child = llm.fork(parent)
        shared = llm.blocks.table(parent)[-1]
        assert llm.blocks.references[shared] == 2
        llm.step()
        assert llm.blocks.table(parent)[:-1] == llm.blocks.table(child)[:-1]
        assert llm.blocks.references[shared] == 1
        while llm.unfinished:
            llm.step()
            llm.refill()
        seen = worker.watched()
        assert seen is not None
        assert seen.strays == []
        assert all(bool((c.keys.data == 3e4).all() and (c.values.data == 3e4).all()) for c in worker.caches)
        assert worker.watched() is None


@pytest.mark.deep
@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        pytest.param("gemma3", {"block_size": 32, "max_num_batched_tokens": 32, "max_num_seqs": 4}, id="chunks"),
        pytest.param("gemma2", {"block_size": 64, "dtype": "bfloat16"}, id="bfloat16"),
        pytest.param("qwen2", {"tensor_parallel_size": 2}, id="two ranks"),
        pytest.param("qwen2", {"pipeline_parallel_size": 2}, id="two stages"),
        pytest.param("qwen2", {"enable_prefix_caching": True, "block_size": 32}, id="prefixes"),
    ],
)
def test_vllm_is_quiet_when_clean_and_told_of_when_not(
    importable: None, watch: Watch, family: str, arguments: dict[str, Any]
) -> None:
    fault = find("kv-offset-not-advanced")
    model = tiny_model(family, num_hidden_layers=3)
    engine = ProcessEngine("vllm", str(model), {"dtype": "float32", "provenance": False, **arguments})
    engine.open()
    try:
        cases = pk.cases("len-70+6", *CASES).resolve(vocab_size=499)
        seen = watch(engine, [*cases, *one_after_the_other(cases)])
        assert (seen.strays, seen.unwatched) == ([], {})
        assert sorted(seen.layers) == [f"model.layers.{n}.self_attn" for n in range(3)]
        with planted(engine, fault, layer=1):
            strays = watch(engine, cases).strays
        assert LAYER in {n for s in strays for n in (s.layer, *s.beside)}
        assert {s.layer for s in strays} == {strays[0].layer}
        assert {s.kind for s in strays} >= {"foreign"}
    finally:
        engine.close()
