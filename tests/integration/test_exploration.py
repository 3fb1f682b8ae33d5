"""Drawn workloads: a clean engine passes, a wrong one fails with the smallest workload that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import paritykit as pk
from paritykit.case import CaseSet
from paritykit.checks import CHECKS
from paritykit.checks.base import InvarianceCheck
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.errors import UnknownNameError
from paritykit.exploration import explore
from paritykit.invariance.explore import PROFILES, Ground, Profile, find_profile, known_edges, smallest_failing
from paritykit.session import Session
from paritykit.testing.faults import FAULTS
from tests.faulty import homes, model_of
from tests.nano import one_thread

GROUND = Ground(block_size=16, window=8, longest=40)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def session() -> Iterator[Any]:
    opened: list[Session] = []

    def make(model: Path, **arguments: Any) -> Session:
        found, own = Checkpoint.find(str(model)), {"provenance": False, "block_size": 16, **arguments}
        made = Session(
            reference=HFEngine(str(model)),
            candidate=NanoEngine(str(model), **own),
            cases=pk.cases("len-2").resolve(vocab_size=found.vocab_size),
            checkpoint=found,
            vary=lambda more: NanoEngine(str(model), **{**own, **more}),
        )
        opened.append(made)
        return made

    yield make
    for each in opened:
        each.close()


def look(session: Session, model: Path, name: str, *, profile: Profile = PROFILES["ci"]) -> Any:
    check = CHECKS.get(name)
    assert isinstance(check, InvarianceCheck)
    return explore(session, check, checkpoint=Checkpoint.find(str(model)), profile=profile)


def test_a_clean_engine_passes_in_every_way_it_is_run(session: Any) -> None:
    model = model_of("gemma2")
    ran = session(model)
    for name in ("chunking", "kv_cache"):
        found = look(ran, model, name)
        assert found.failing == []
        assert {f.verdict for f in found.answer.findings} == {"pass"}
        assert found.tried >= 3
        assert found.answer.coverage.compared == len({f.point for f in found.answer.findings}) > 1
    assert set(ran.starts) == {"candidate", "reference", "max_num_batched_tokens=7, max_num_seqs=7", "block_size=3"}
    assert set(ran.starts.values()) == {1}
    assert any(f.point.endswith("#key_cache") for f in found.answer.findings)


@pytest.mark.parametrize(("check", "fault", "smallest"), [
    ("batching", "kv-table-rows-swapped", ["len-1", "len-1@b"]),
    ("chunking", "position-restart-in-chunk", ["len-8"]),
])  # fmt: skip
def test_a_wrong_engine_fails_with_the_smallest_workload(
    session: Any, check: str, fault: str, smallest: list[str]
) -> None:
    planted = FAULTS.get(fault)
    home, layer = next(iter(homes(planted).items()))
    model = model_of(home)
    found = look(session(model, **planted.arguments(layer=layer)), model, check)
    assert [c.id for c in found.failing] == smallest
    failing = [f for f in found.answer.findings if f.verdict == "fail"]
    assert {f.case for f in failing} <= set(smallest)
    assert min(failing, key=lambda f: (f.origin == "inherited", f.order)).origin == "introduced"
    assert len(found.answer.findings) > 50


def test_what_an_engine_cannot_do_is_told(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2")
    ran = session(model)
    monkeypatch.setattr(NanoEngine, "capabilities", NanoEngine.capabilities - {"prefix_caching"})
    found = look(ran, model, "prefix_cache")
    assert found.answer.findings == []
    assert [u.reason for u in found.answer.coverage.skipped] == ["engine nano has no prefix cache"]


def test_the_first_workload_crosses_the_edges() -> None:
    assert known_edges(GROUND).ids() == ["len-17+3", "len-1+2", "len-9+2@b"]
    plain = Ground(block_size=128, window=0, longest=200)
    assert known_edges(plain).ids() == ["len-129+3", "len-1+2", "len-200+2@b"]


def test_a_failure_that_comes_and_goes_is_a_failure() -> None:
    calls: list[list[str]] = []

    def now_and_then(workload: CaseSet) -> bool:
        calls.append(workload.ids())
        return len(calls) % 3 == 0

    found = smallest_failing(now_and_then, GROUND, name="a test", profile=Profile(examples=20))
    assert found is not None
    assert found.ids() in calls


def test_one_that_only_the_first_workload_shows_is_shown_by_it() -> None:
    first = known_edges(GROUND).ids()
    found = smallest_failing(lambda w: w.ids() == first, GROUND, name="a test", profile=Profile(examples=2, tries=5))
    assert found is not None
    assert found.ids() == first


def test_an_unknown_profile_is_told() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'deep'"):
        find_profile("deeep")
