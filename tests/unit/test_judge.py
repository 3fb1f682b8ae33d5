"""From numbers to a verdict: each kind of fault fails, a clean pair passes, and limits come from where they say."""

from __future__ import annotations

import itertools
import math
from array import array
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.comparison.judge import PROFILE, finding_from, judge, pool, ranges
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.metrics import measure
from paritykit.comparison.tolerance import ROUNDING, Tolerance, check_overrides, coarser, fallback, tolerance_for
from paritykit.errors import UnknownNameError, UsageError
from paritykit.results import Finding

ALLOWED = Tolerance(1e-3, 8e-3, "test")


def reference() -> torch.Tensor:
    return torch.randn(100, 32, generator=torch.Generator().manual_seed(0))


def judged(candidate: torch.Tensor, ours: torch.Tensor | None = None) -> tuple[str, str, float, float]:
    return judge(measure(reference() if ours is None else ours, candidate), ALLOWED)


def finding(candidate: torch.Tensor, *, start: int = 0) -> Finding:
    return finding_from(
        measure(reference(), candidate),
        ALLOWED,
        check="modules",
        case="a",
        point="m",
        order=3,
        places=list(range(start, start + 100)),
        shape=[100, 32],
        dtypes=("float32", "float32"),
        candidate_point="n",
        mapping="n (equal name)",
    )


def test_a_clean_pair_passes() -> None:
    assert judged(reference()) == ("pass", "rel_l2", 0.0, 1e-3)
    verdict, metric, value, _ = judged(reference() * (1 + 5e-4))
    assert (verdict, metric) == ("pass", "rel_l2")
    assert value == pytest.approx(5e-4, rel=1e-3)


def test_the_whole_point() -> None:
    verdict, metric, value, allowed = judged(reference() * 1.002)
    assert (verdict, metric, allowed) == ("fail", "rel_l2", 1e-3)
    assert value == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize("row", [0, 57, 99])
def test_one_bad_position_among_many(row: int) -> None:
    """Off by 0.9 % at one position: 0.09 % of the whole, which alone would pass."""
    wrong = reference()
    wrong[row] *= 1.009
    verdict, metric, value, allowed = judged(wrong)
    assert (verdict, metric, allowed) == ("fail", "position_rel_l2", 8e-3)
    assert value == pytest.approx(9e-3, rel=1e-2)
    found = finding(wrong, start=10)
    assert found.failing == [(10 + row, 10 + row)]
    assert found.positions == (10, 109)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number(value: float) -> None:
    wrong, right = reference(), reference()
    wrong[3, 4] = value
    assert judged(wrong) == ("fail", "nonfinite_mismatch", 1.0, 0.0)
    right[3, 4] = value
    assert judged(wrong, right)[0] == "pass"
    assert judged(reference(), right) == ("fail", "nonfinite_mismatch", 1.0, 0.0)
    found = finding(wrong)
    assert found.failing == [(3, 3)]
    assert None not in [*found.profile[:2], *found.profile[4:]]


def test_zero_where_there_is_something() -> None:
    assert judged(torch.zeros(100, 32))[:2] == ("fail", "rel_l2")
    assert judged(reference(), torch.zeros(100, 32))[0] == "fail"
    assert judged(torch.zeros(100, 32), torch.zeros(100, 32))[0] == "pass"


def test_a_passing_finding_names_no_position() -> None:
    wrong = reference()
    wrong[5] *= 1.004
    found = finding(wrong)
    assert (found.verdict, found.failing) == ("pass", [])
    assert max(v for v in found.profile if v is not None) == pytest.approx(4e-3, rel=1e-2)


def numbers(**fields: Any) -> Measurement:
    zeros = {n: 0 for n in Measurement.__struct_fields__ if n != "row_rel_l2"}
    return Measurement(**{**zeros, "row_rel_l2": array("d"), **fields})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_measure_that_is_no_number_never_passes(value: float) -> None:
    assert judge(numbers(rel_l2=value), ALLOWED)[0] == "fail"
    assert judge(numbers(rel_l2=value, row_rel_l2=array("d", [value])), ALLOWED)[0] == "fail"
    assert judge(numbers(row_rel_l2=array("d", [math.inf])), ALLOWED)[:2] == ("fail", "position_rel_l2")


@given(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=5))
def test_it_fails_exactly_beyond_a_limit_and_reports_the_worse_one(whole: float, rows: list[float]) -> None:
    verdict, metric, value, allowed = judge(numbers(rel_l2=whole, row_rel_l2=array("d", rows)), ALLOWED)
    worst = max(rows, default=0.0)
    assert (verdict == "fail") == (whole > 1e-3 or worst / 8e-3 > 1)
    assert (verdict == "fail") == (value > allowed)
    if verdict == "fail":
        other = worst / 8e-3 if metric == "rel_l2" else whole / 1e-3
        assert value / allowed >= other * (1 - 1e-12)


@given(st.sets(st.integers(-50, 50)))
def test_ranges_hold_exactly_their_values(values: set[int]) -> None:
    found = ranges(sorted(values))
    assert [v for first, last in found for v in range(first, last + 1)] == sorted(values)
    assert all(right[0] - left[1] > 1 for left, right in itertools.pairwise(found))


@given(st.lists(st.floats(0, 10), max_size=500), st.integers(1, 70))
def test_pooling_keeps_the_peaks(values: list[float], size: int) -> None:
    pooled = pool(values, size=size)
    assert len(pooled) == min(len(values), size)
    assert max((p for p in pooled if p is not None), default=0.0) == max(values, default=0.0)
    assert set(pooled) <= set(values)
    if len(values) <= size:
        assert pooled == values


@given(st.integers(65, 400), st.data())
def test_pooling_shows_what_is_infinite(length: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, length - 1))
    values = [0.5] * length
    values[place] = math.inf
    pooled = pool(values)
    assert len(pooled) == PROFILE
    assert pooled.count(None) == 1
    assert abs(pooled.index(None) / PROFILE - place / length) <= 1.5 / PROFILE


DTYPES = sorted(ROUNDING, key=ROUNDING.__getitem__)


@given(st.sampled_from(DTYPES), st.integers(0, 10**5), st.integers(0, 10**5))
def test_the_fallback_grows_with_depth(dtype: str, first: int, second: int) -> None:
    low, high = sorted((first, second))
    assert 0 < fallback(dtype, depth=low) <= fallback(dtype, depth=high) < 1


@given(st.integers(0, 10**5))
def test_the_fallback_grows_with_the_rounding_step(depth: int) -> None:
    allowed = [fallback(d, depth=depth) for d in DTYPES]
    assert allowed == sorted(allowed)
    assert fallback("bfloat16", depth=0) > fallback("float16", depth=0) > fallback("float32", depth=0)
    assert allowed[-1] > ROUNDING["bfloat16"]


@given(st.sampled_from([*DTYPES, "float8_e4m3fn"]), st.sampled_from(DTYPES))
def test_the_coarser_side_decides(left: str, right: str) -> None:
    known = [d if d in ROUNDING else "bfloat16" for d in (left, right)]
    assert coarser((left, right)) == coarser((right, left)) == max(known, key=DTYPES.index)


def test_an_override_wins_and_says_so() -> None:
    found = tolerance_for(("float32", "bfloat16"), depth=5, overrides={"bfloat16": 0.03}, source="command line")
    assert (found.whole, found.source) == (0.03, "tolerance.bfloat16 (command line)")
    assert found.position > found.whole
    other = tolerance_for(("float32", "float32"), depth=5, overrides={"bfloat16": 0.03}, source="command line")
    assert other.whole == fallback("float32", depth=5)
    assert "fallback table, float32" in other.source


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, math.inf, True, "0.1", None, [0.1]], ids=repr)
def test_a_tolerance_that_is_none(value: object) -> None:
    with pytest.raises(UsageError, match=r"tolerance\.bfloat16 must be a number between 0 and 1"):
        check_overrides({"bfloat16": value})


def test_a_tolerance_for_no_dtype() -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype in tolerance 'bfloat'; did you mean 'bfloat16'"):
        check_overrides({"bfloat": 0.1})
    assert check_overrides({"float32": 1e-6, "float16": 0.5}) == {"float32": 1e-6, "float16": 0.5}


def test_a_finding_is_plain_data() -> None:
    found = finding(reference() * 1.002)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Finding) == found
