"""From numbers to a verdict: one finding for each point and case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from paritykit.comparison.measurement import Measurement
from paritykit.comparison.tolerance import Tolerance
from paritykit.results import Finding, Verdict

PROFILE = 64


def judge(measured: Measurement, allowed: Tolerance) -> tuple[Verdict, str, float, float]:
    """(verdict, judged metric, its value, allowed).

    Fails on a NaN or Inf that the reference has not, on the whole point's ``rel_l2``, or on one position's. The metric
    reported is the one that is furthest beyond its limit.
    """
    if measured.nonfinite_mismatch:
        return "fail", "nonfinite_mismatch", float(measured.nonfinite_mismatch), 0.0
    worst = max((r for r in measured.row_rel_l2 if not math.isnan(r)), default=0.0)
    if worst * allowed.whole > allowed.position * max(measured.rel_l2, allowed.whole):
        return "fail", "position_rel_l2", worst, allowed.position
    return ("pass" if measured.rel_l2 <= allowed.whole else "fail"), "rel_l2", measured.rel_l2, allowed.whole


def finding_from(
    measured: Measurement,
    allowed: Tolerance,
    *,
    check: str,
    case: str,
    point: str,
    order: int,
    places: list[int],
    shape: list[int],
    dtypes: tuple[str, str],
    candidate_point: str,
    mapping: str,
) -> Finding:
    """The finding of one measured pair; ``places`` are the positions of its rows."""
    verdict, metric, value, limit = judge(measured, allowed)
    rows = list(measured.row_rel_l2)
    return Finding(
        check=check,
        case=case,
        point=point,
        verdict=verdict,
        metric=metric,
        value=value,
        allowed=limit,
        allowed_source=allowed.source,
        order=order,
        candidate_point=candidate_point,
        mapping=mapping,
        metrics=dict(measured.as_dict()),
        positions=(places[0], places[-1]),
        failing=ranges(p for p, r in zip(places, rows, strict=True) if not r <= allowed.whole)
        if verdict == "fail"
        else [],
        profile=pool(rows),
        shape=shape,
        dtypes=dtypes,
    )


def ranges(values: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending integers as inclusive ranges.

    >>> ranges([1, 2, 3, 7])
    [(1, 3), (7, 7)]
    """
    found: list[tuple[int, int]] = []
    for value in values:
        if found and value == found[-1][1] + 1:
            found[-1] = (found[-1][0], value)
        else:
            found.append((value, value))
    return found


def pool(values: list[float], *, size: int = PROFILE) -> list[float | None]:
    """At most ``size`` numbers, each the largest of its share of ``values``; None where that is not finite."""
    if len(values) <= size:
        return [v if math.isfinite(v) else None for v in values]
    edges = [round(i * len(values) / size) for i in range(size + 1)]
    return pool([max(values[a:b]) for a, b in pairwise(edges)], size=size)
