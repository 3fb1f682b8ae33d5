"""An engine against itself: quiet on clean nano however it runs, and each fault found under the condition it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import paritykit as pk
from paritykit.checks import CHECKS, INVARIANCES
from paritykit.checks.base import Answer, InvarianceCheck
from paritykit.diagnose.locate import first_divergence
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.results import Finding
from paritykit.session import Session
from paritykit.testing import tiny_model
from paritykit.testing.faults import FAULTS, Fault
from tests.faulty import VOCABULARY, homes, model_of
from tests.nano import one_thread

CASES = ("len-36+3@b", "len-5+3", "len-1+2")
LONG = ("len-70+6", *CASES)
"""For conditions with blocks of 32."""
RANKED = ("tensor_parallel", "pipeline_parallel")
KEPT = {"tensor_parallel_size", "enable_prefix_caching", "max_num_batched_tokens"}
"""Arguments of a fault's conditions that its check varies itself."""
QUICK = {
    ("batching", "kv-table-rows-swapped"),
    ("chunking", "position-restart-in-chunk"),
    ("decode_prefill", "window-missing-in-decode"),
    ("kv_cache", "kv-padding-writes"),
    ("prefix_cache", "prefix-hash-ignores-parent"),
}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def make(model: Path, *, cases: list[pk.Case] | None = None, **arguments: Any) -> Session:
        found = Checkpoint.find(str(model))
        own = {"provenance": False, **arguments}
        made = Session(
            reference=HFEngine(str(model)),
            candidate=NanoEngine(str(model), **own),
            cases=cases or pk.cases(*CASES).resolve(vocab_size=found.vocab_size),
            checkpoint=found,
            vary=lambda more: NanoEngine(str(model), **{**own, **more}),
        )
        opened.append(made)
        return made

    yield make
    for each in opened:
        each.close()


def vary(session: Session, name: str) -> Answer:
    check = CHECKS.get(name)
    assert isinstance(check, InvarianceCheck)
    return session.vary(check)


def failing(answer: Answer) -> list[Finding]:
    return sorted((f for f in answer.findings if f.verdict == "fail"), key=lambda f: (f.origin == "inherited", f.order))


@pytest.mark.parametrize("family", ["gemma2", pytest.param("mixtral", marks=pytest.mark.deep)])
def test_quiet_on_a_clean_engine(session: Callable[..., Session], family: str) -> None:
    ran = session(tiny_model(family, num_hidden_layers=2))
    for name in INVARIANCES:
        if name not in RANKED:
            answer = vary(ran, name)
            assert [f for f in answer.findings if f.verdict != "pass"] == [], name
            assert {f.case for f in answer.findings} == set(CASES), name
            assert not answer.coverage.skipped
            assert answer.coverage.compared == (2 if name == "observer" else answer.coverage.points) > 1
            assert all(
                "order of sums" in f.allowed_source for f in answer.findings if f.metric == "rel_l2" and f.condition
            )
    assert set(ran.starts) == {
        "reference",
        "candidate",
        "max_num_batched_tokens=1, max_num_seqs=1",
        "max_num_batched_tokens=7, max_num_seqs=7",
        "max_num_batched_tokens=16",
        "enable_prefix_caching=True",
        "kv=contiguous",
        "block_size=1",
        "block_size=3",
    }
    assert set(ran.starts.values()) == {1}


@pytest.mark.parametrize("name", RANKED)
def test_quiet_on_several_ranks(session: Callable[..., Session], name: str) -> None:
    answer = vary(session(tiny_model("qwen2", num_hidden_layers=2)), name)
    assert [f for f in answer.findings if f.verdict != "pass"] == []
    assert answer.coverage.compared > 50
    sizes = (2, 4) if name == "tensor_parallel" else (2,)
    assert {f.condition for f in answer.findings} <= {f"{name}_size {n}" for n in sizes}
    assert {f.case for f in answer.findings if f.point == "#replicas"} == (set(CASES) if len(sizes) > 1 else set())
    assert [(u.point, "provenance is off" in u.reason) for u in answer.coverage.skipped] == [("#parameters", True)]


@pytest.mark.deep
@pytest.mark.parametrize(("name", "fault", "wrong"), [
    ("tensor_parallel", "null-loading", set()),
    ("tensor_parallel", "gate-and-up-exchanged", set()),
    ("pipeline_parallel", "gate-and-up-exchanged", set()),
    ("tensor_parallel", "shard-of-rank-0", {"model.layers.1.mlp.down_proj.weight"}),
])  # fmt: skip
def test_weights_are_held_against_those_of_one_rank(
    session: Callable[..., Session], name: str, fault: str, wrong: set[str]
) -> None:
    """What a loader does wrong on one rank as well is no matter of several."""
    arguments = FAULTS.get(fault).arguments(layer=1)
    answer = vary(session(model_of("qwen2"), provenance=True, **arguments), name)
    told = [f for f in answer.findings if not f.case]
    assert {f.point for f in told if f.verdict == "fail"} == wrong
    assert {f.point for f in told if f.verdict == "pass"} <= {"#parameters"}
    assert told
    assert answer.coverage.skipped == []


def planted(check: str) -> Iterator[Any]:
    for name, fault in FAULTS.items():
        if check in fault.checks and "nano" in fault.engines and fault.stage != "checkpoint":
            yield pytest.param(check, name, marks=() if (check, name) in QUICK else pytest.mark.deep)


@pytest.mark.parametrize(("check", "name"), [p for c in INVARIANCES for p in planted(c)])
def test_a_fault_is_found_under_its_condition(session: Callable[..., Session], check: str, name: str) -> None:
    fault: Fault = FAULTS.get(name)
    home, layer = next(iter(homes(fault).items()))
    model, conditions = model_of(home), {k: v for k, v in fault.when.arguments.items() if k not in KEPT}
    cases = pk.cases(*LONG).resolve(vocab_size=VOCABULARY) if "block_size" in conditions else None
    if "num_blocks" in conditions:
        cases = fault.when.cases(vocab_size=VOCABULARY)
    answer = vary(session(model, cases=cases, **conditions, **fault.arguments(layer=layer)), check)
    found = failing(answer)
    assert found, f"{check} does not see {name}"
    assert found[0].origin != "inherited"


def test_one_difference_says_that_a_workload_fails_and_all_runs_say_where(
    session: Callable[..., Session],
) -> None:
    fault = FAULTS.get("kv-table-rows-swapped")
    ran, check = session(model_of("qwen2"), **fault.arguments(layer=1)), CHECKS.get("batching")
    assert isinstance(check, InvarianceCheck)
    workload = pk.cases("len-5", "len-3@b", "len-4@b").resolve(vocab_size=VOCABULARY)
    quick, whole = (ran.vary(check, workload, located=located).findings for located in (False, True))
    assert {f.point for f in quick} == {"#logits"}
    assert {f.condition for f in quick} == {"in one batch"}
    assert "beside len-5" in " ".join(f.message for f in whole)
    first = first_divergence(whole)
    assert first is not None
    assert (first.point, first.origin) == (fault.at(layer=1), "introduced")


def test_an_engine_that_cannot_be_started_again_skips_with_a_reason() -> None:
    model = tiny_model("qwen2", num_hidden_layers=2)
    found = Checkpoint.find(str(model))
    cases = pk.cases("len-5+2").resolve(vocab_size=found.vocab_size)
    candidate = NanoEngine(str(model), provenance=False)
    with Session(reference=HFEngine(str(model)), candidate=candidate, cases=cases, checkpoint=found) as ran:
        answer = vary(ran, "chunking")
        assert answer.findings == []
        assert {u.reason for u in answer.coverage.skipped} == {
            "this engine cannot be started again with other arguments"
        }
        assert vary(ran, "repeat").findings


def test_a_block_behind_another_one_differs_from_it_beyond_any_window(session: Callable[..., Session]) -> None:
    """In two layers of Gemma 3 nothing is seen of the 32nd position before: the first of the block before this one."""
    fault = FAULTS.get("prefix-hash-ignores-parent")
    cases = fault.when.cases(vocab_size=VOCABULARY)[-1:]
    ran = session(model_of("gemma3"), cases=cases, block_size=32, **fault.arguments())
    assert failing(vary(ran, "prefix_cache"))
