"""From numbers to a verdict: one finding for each point and case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from paritykit.comparison.floor import Judged, beyond_floor
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.noise import Noise
from paritykit.comparison.tolerance import POSITION_FACTOR, Tolerance
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
    allowed: Tolerance | Judged,
    *,
    noise: Noise | None = None,
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
    """The finding of one measured pair; ``places`` are the positions of its rows.

    ``allowed`` is what it is held against, or what the floor's judge said of its ``noise``.
    """
    ruled = allowed if isinstance(allowed, Judged) else _ruled(measured, allowed)
    flagged = _beyond(measured, allowed, noise)
    return Finding(
        check=check,
        case=case,
        point=point,
        verdict=ruled.verdict,
        metric=ruled.metric,
        value=ruled.value,
        allowed=ruled.allowed,
        allowed_source=ruled.source,
        noise_floor=ruled.floor,
        needs={} if ruled.needed is None else {"tolerance" if noise is None else "factor": ruled.needed},
        order=order,
        candidate_point=candidate_point,
        mapping=mapping,
        metrics=dict(measured.as_dict() | (noise.as_dict() if noise is not None else {})),
        positions=(places[0], places[-1]),
        failing=ranges(p for p, far in zip(places, flagged, strict=True) if far) if ruled.verdict == "fail" else [],
        profile=pool(list(measured.row_rel_l2)),
        floor_profile=pool(list(noise.twin.row)) if noise is not None else [],
        shape=shape,
        dtypes=dtypes,
    )


def _ruled(measured: Measurement, allowed: Tolerance) -> Judged:
    verdict, metric, value, limit = judge(measured, allowed)
    worst = max(measured.row_rel_l2, default=0.0)
    needed = max(measured.rel_l2, worst / POSITION_FACTOR)
    return Judged(
        verdict=verdict,
        metric=metric,
        value=value,
        allowed=limit,
        floor=None,
        source=allowed.source,
        needed=needed if math.isfinite(needed) and not measured.nonfinite_mismatch else None,
    )


def _beyond(measured: Measurement, allowed: Tolerance | Judged, noise: Noise | None) -> Sequence[bool]:
    """Which rows are beyond what is allowed of each; those with a NaN or Inf of their own always."""
    rows = measured.row_rel_l2
    if noise is None or not isinstance(allowed, Judged):
        return [not r <= (allowed.whole if isinstance(allowed, Tolerance) else allowed.allowed) for r in rows]
    flagged = beyond_floor(noise, dtype=allowed.dtype, factor=allowed.factor)
    return [far or not math.isfinite(r) for far, r in zip(flagged, rows, strict=True)]


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
