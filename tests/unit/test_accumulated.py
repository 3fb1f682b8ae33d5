"""Rounding that added up is no failure; a culprit, or a wrong output, is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from paritykit.diagnose.accumulated import accumulate
from paritykit.diagnose.replay import expose
from paritykit.reports import REPORTS
from paritykit.reports.added_up import added_up
from paritykit.results import Coverage, Finding, Local, Results, Run, Side
from paritykit.verdict import summarise

LAYER, BLOCK, LEAF = "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.down_proj"


def finding(point: str, verdict: str, *, local: str = "", culprit: bool = False, **others: Any) -> Finding:
    told = Local(verdict=local, culprit=culprit) if local else None  # type: ignore[arg-type]
    given = {"check": "modules", "case": "a", "metric": "scale", "value": 2.0, "allowed": 1.0, **others}
    return Finding(point=point, verdict=verdict, local=told, **given)  # type: ignore[arg-type]


CLEAN = [
    finding(LAYER, "pass", local="pass"),
    finding(BLOCK, "fail", local="pass", origin="introduced", located=BLOCK),
    finding(LEAF, "fail", origin="inherited"),
    finding("#logits", "pass", check="logits", local="pass"),
]


def test_what_is_right_by_itself_passes_and_so_does_what_is_inside() -> None:
    found = accumulate(CLEAN, replayed=["a"])
    assert [f.verdict for f in found] == ["pass"] * 4
    assert [f.kind for f in found] == ["", "accumulated", "accumulated", ""]
    assert all(f.origin is None and not f.located for f in found)
    assert found[1].value == 2.0
    assert "added up" in found[1].message


@pytest.mark.parametrize(
    "more",
    [
        finding("model.layers.0", "fail", local="fail", culprit=True),
        finding("model.layers.0", "fail", local="fail", culprit=True, case="b"),
        finding("#logits", "fail", check="logits", local="pass"),
        finding("#tokens", "fail", check="tokens"),
        finding("model.layers.0.self_attn#key_cache", "fail", local="pass"),
        finding("#tokens", "error", check="tokens"),
    ],
    ids=["culprit", "culprit-elsewhere", "logits", "tokens", "cache", "error"],
)
def test_a_culprit_or_a_wrong_output_keeps_every_failure(more: Finding) -> None:
    found = accumulate([*CLEAN, more], replayed=["a", "b"])
    assert found == [*CLEAN, more]


def test_a_case_that_was_not_replayed_keeps_its_failures() -> None:
    assert accumulate(CLEAN, replayed=["b"]) == CLEAN


@pytest.mark.parametrize("local", ["fail", "error", ""])
def test_what_was_not_seen_to_be_right_fails(local: str) -> None:
    alone = finding(BLOCK, "fail", local=local)
    assert accumulate([alone], replayed=["a"]) == [alone]


def test_a_point_of_another_size_is_no_rounding() -> None:
    misfit = msgspec.structs.replace(CLEAN[1], metric="shape")
    assert accumulate([misfit], replayed=["a"]) == [misfit]


def test_every_report_says_how_much_added_up_and_where() -> None:
    sides = Side(engine="hf", model="m", dtype="float64"), Side(engine="nano", model="m", dtype="float32")
    found = accumulate(CLEAN, replayed=["a"])
    summary = summarise(["modules"], [Coverage(check="modules", points=4, compared=4)], found, min_coverage=0.5)
    run = Run(reference=sides[0], candidate=sides[1], checks=["modules"], command="", paritykit="0", created="")
    results = Results(run=run, findings=found, summary=summary)
    assert summary.verdict == "pass"
    assert added_up(results).startswith(f"rounding of 2 points added up beyond the floor, most at {BLOCK} / a: scale")
    for name in ("terminal", "markdown", "html"):
        assert "added up beyond the floor" in REPORTS.get(name)(results).decode()
    assert not added_up(Results(run=run, findings=CLEAN[:1], summary=summary))


def test_what_the_free_run_hides_fails_by_its_local_error() -> None:
    local = Local(verdict="fail", metric="rel_l2", value=3.0, noise_floor=1.0, needs={"factor": 6.0}, culprit=True)
    hidden = msgspec.structs.replace(CLEAN[0], local=local, noise_floor=2.0, needs={"factor": 1.1})
    found = expose(hidden)
    assert (found.noise_floor, found.needs) == (1.0, {"factor": 6.0})
    assert (found.verdict, found.origin, found.metric, found.value) == ("fail", "introduced", "rel_l2", 3.0)
    assert "hides it" in found.message
    assert [expose(f) for f in CLEAN] == CLEAN
