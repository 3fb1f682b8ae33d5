"""A verdict is never greener than what was compared."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.results import VERDICTS, Coverage, Summary, Unmatched
from paritykit.verdict import check_verdict, summarise
from tests.made import finding


def coverage(compared: int = 10, missing: int = 0, check: str = "modules", **fields: Any) -> Coverage:
    left = [Unmatched(side="reference", point=f"p{n}") for n in range(missing)]
    return Coverage(check=check, points=compared + missing, compared=compared, unmatched=left, **fields)


def summary(*verdicts: str, covered: Coverage | None = None) -> Summary:
    found = [finding(f"p{n}", v, order=n, message="why") for n, v in enumerate(verdicts)]
    return summarise(["modules"], [covered or coverage()], found, min_coverage=0.9)


@pytest.mark.parametrize(("verdicts", "wanted", "code"), [
    (["pass"], "pass", 0),
    (["pass", "skip"], "pass", 0),
    (["pass", "inconclusive"], "inconclusive", 4),
    (["pass", "inconclusive", "error"], "error", 3),
    (["pass", "inconclusive", "error", "fail"], "fail", 1),
    (["fail"], "fail", 1),
    (["error"], "error", 3),
    (["skip"], "inconclusive", 5),
    ([], "inconclusive", 5),
])  # fmt: skip
def test_the_worst_finding_decides(verdicts: list[str], wanted: str, code: int) -> None:
    found = summary(*verdicts)
    assert (found.verdict, found.exit_code) == (wanted, code)
    assert found.checks == {"modules": wanted}


@given(st.lists(st.sampled_from(VERDICTS)), st.integers(0, 20), st.integers(0, 20))
def test_green_means_compared_and_nothing_worse(verdicts: list[str], compared: int, missing: int) -> None:
    found = summary(*verdicts, covered=coverage(compared, missing))
    green = found.verdict == "pass"
    assert green == (found.exit_code == 0)
    if green:
        assert "pass" in verdicts
        assert set(verdicts) <= {"pass", "skip"}
        assert compared >= 9 * missing
    assert found.failed == verdicts.count("fail")
    assert found.errors == verdicts.count("error")
    assert found.compared == sum(v in ("pass", "fail", "inconclusive") for v in verdicts)
    assert (found.first_divergence is None) == ("fail" not in verdicts)


@pytest.mark.parametrize(("missing", "wanted", "code"), [(0, "pass", 0), (1, "pass", 0), (2, "inconclusive", 4)])
def test_low_coverage_is_inconclusive(missing: int, wanted: str, code: int) -> None:
    found = summary("pass", covered=coverage(10, missing))
    assert (found.verdict, found.exit_code) == (wanted, code)
    assert found.unmatched == missing
    if code:
        assert found.message == "modules: only 10 of 12 points were compared"


def test_low_coverage_does_not_hide_a_failure() -> None:
    assert summary("fail", covered=coverage(1, 50)).verdict == "fail"


def test_points_left_out_for_a_reason_and_the_candidates_own_do_not_count_against_it() -> None:
    left = [Unmatched(side="candidate", point=f"c{n}") for n in range(50)]
    skipped = [Unmatched(side="reference", point=f"s{n}", reason="known") for n in range(50)]
    covered = Coverage(check="modules", points=60, compared=10, unmatched=left, skipped=skipped)
    found = summary("pass", covered=covered)
    assert (found.verdict, found.unmatched, found.skipped) == ("pass", 50, 50)


def test_nothing_compared_says_so() -> None:
    assert summary(covered=coverage(0, 3)).message == "nothing was compared"
    assert summary("error").message == "nothing was compared"


def test_a_run_without_checks_is_never_green() -> None:
    found = summarise([], [], [], min_coverage=0.9)
    assert (found.verdict, found.exit_code, found.message) == ("inconclusive", 5, "nothing was compared")


def test_one_check_without_findings_keeps_the_run_from_green() -> None:
    found = summarise(
        ["modules", "tokens"],
        [coverage(), coverage(0, 1, check="tokens")],
        [finding("p", "pass")],
        min_coverage=0.9,
    )
    assert (found.verdict, found.exit_code) == ("inconclusive", 4)
    assert found.checks == {"modules": "pass", "tokens": "inconclusive"}


def test_a_check_that_only_skipped_is_not_green() -> None:
    assert check_verdict(coverage(), [finding("p", "skip")], min_coverage=0.9) == "inconclusive"
    assert check_verdict(coverage(), [], min_coverage=0.0) == "inconclusive"


def test_why_it_is_inconclusive() -> None:
    assert summary("pass", "inconclusive").message == "p1: why"
