"""Judging a candidate by the noise floor: its error against the truth beside the error of the reference's own twin.

A correct engine rounds as often as the twin, only elsewhere, so its error is about the twin's. This was measured over
ten dense tiny families in nano and vLLM, on one and two ranks, and in Transformers against itself (sdpa, batched):
12,939 points and cases in bfloat16, 9,465 in float32, of 14 to 207 rows. What is judged, how many times the twin's own
number it reached there, and how many times is allowed, to be multiplied by what chance adds:

====================  =========================================  ========  =======  =======
number                what it is                                 bfloat16  float32  allowed
====================  =========================================  ========  =======  =======
``rel_l2``            the whole error                            1.2       1.5      2
``typical_rel_l2``    geometric mean of the rows' errors         1.1       1.5      2
``position_rel_l2``   the worst row                              2.8       2.8      2
``channel_rel_l2``    the worst channel                          3.3       5.4      2
``row_scale``         factors of each row's own                  2.0       2.5      2
``channel_scale``     factors of each channel's own              1.4       1.9      2
``channel_bias``      offsets of each channel's own              1.5       2.0      2
``scale``             one constant factor                        2.5       2.7      4
====================  =========================================  ========  =======  =======

Chance: the logarithm of the ratio of one row's errors scattered by 0.13 to 0.23 over a million rows of 64 to 499
numbers, whatever their width, as if a row held ``DEGREES`` = 25 independent ones. A ratio of errors that are made of
``n`` such numbers is allowed ``exp(SIGMAS / sqrt(n))`` more: one chance in three million if that logarithm is normal.
Torch-free.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator

import msgspec
import numpy as np

from paritykit.comparison.drawn import drawn_guards
from paritykit.comparison.ensemble import PointDraws
from paritykit.comparison.guard import (
    CHANNEL_DEGREES,
    DEGREES,
    LEAST_PART,
    LEAST_SCALE,
    PEAKED,
    Guard,
)
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.noise import Noise, Spread
from paritykit.comparison.tolerance import ROUNDING
from paritykit.results import Verdict

FACTOR = 2.0
DRAWN_FACTORS = {"float32": 1.5, "float64": 1.5}
DRAWN_FACTOR = 1.75
"""How many times what draws do is allowed, beside chance, by the candidate's dtype, and for any other. Correct engines
needed 1.20 at most in float32 (vLLM's experts with trained weights), and 1.41 in bfloat16 (vLLM's attention on a CPU
without bfloat16 instructions, which cuts what it stores): 17,500 and 9,300 numbers of trained and seeded models under
eleven ways to compute, see ``benchmarks/floor_calibration.py``."""
SCALE = 2.0
"""A constant factor is one number, for which ``LEAST_SCALE`` allows chance; so many times more is allowed beyond it."""
SIGMAS = 5.0
ULPS = 2.0
"""Where the reference has no noise, a candidate may be off by as many units in the last place."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict with the number it rests on, the one that is furthest beyond its limit.

    ``floor`` is the twin's number and ``source`` says how ``allowed`` follows from it. ``needed`` is the smallest
    ``factor`` (or tolerance, where there is no floor) that would pass: None where none would.
    """

    verdict: Verdict
    metric: str
    value: float
    allowed: float
    floor: float | None
    source: str
    needed: float | None = None
    factor: float = FACTOR
    dtype: str = "float32"


def judge_floor(
    measured: Measurement,
    noise: Noise,
    *,
    dtype: str,
    factor: float = FACTOR,
    pooled: float = 0.0,
    note: str = "",
    draws: PointDraws | None = None,
    luck: float = 0.0,
) -> Judged:
    """Whether the candidate is as near the truth as the twin is, within ``factor`` and chance.

    With ``draws``, of the rows that were measured, as near as these are: a number of theirs is beyond its limit with
    the chance ``luck``.

    ``dtype`` is what the candidate stores the point in: half a unit in its last place is the least floor there is.
    ``pooled`` is the noise floor of neighbouring points, for a twin that was lucky at this one; ``note`` says where
    ``factor`` came from.
    """
    if measured.nonfinite_mismatch:
        return Judged(
            verdict="fail",
            metric="nonfinite_mismatch",
            value=float(measured.nonfinite_mismatch),
            allowed=0.0,
            floor=None,
            source="no NaN or Inf that the reference has not",
            factor=factor,
            dtype=dtype,
        )
    if not noise.twin.whole and not pooled:
        return _exact(measured, dtype)
    least = max(half_ulp(dtype), pooled)
    drawn = draws is not None and bool(draws.whole.any())
    if draws is not None and drawn:
        found = list(drawn_guards(noise, draws, least=half_ulp(dtype), chance=luck))
    else:
        found = list(guards(noise, least=least))
    worst = max(found, key=lambda g: g.beyond)
    failed = not worst.beyond <= factor
    shown = worst if failed else found[0]
    return Judged(
        verdict="fail" if failed else "pass",
        metric=shown.metric,
        value=shown.value,
        allowed=factor * shown.chance * shown.floor,
        floor=shown.floor,
        source=(
            _drawn_source(shown, factor=factor)
            if drawn
            else _source(shown, factor=factor, lifted=least > noise.twin.whole, pooled=pooled)
        )
        + (f"; {note}" if note else ""),
        needed=worst.beyond if math.isfinite(worst.beyond) else None,
        factor=factor,
        dtype=dtype,
    )


def half_ulp(dtype: str) -> float:
    """Relative error, as a root mean square, of rounding once to ``dtype``.

    An error is uniform within half a unit u, so u / sqrt(12), and numbers are some 1.5 of the power of two that has u.

    >>> round(half_ulp("bfloat16"), 5)
    0.0015
    """
    return 2 * ROUNDING.get(dtype, ROUNDING["bfloat16"]) / (1.5 * math.sqrt(12))


def chance(numbers: float) -> float:
    """How far beyond equal two errors may be by chance, if each is made of ``numbers`` independent numbers.

    >>> round(chance(25), 2), round(chance(10000), 2)
    (2.72, 1.05)
    """
    return math.exp(SIGMAS / math.sqrt(max(numbers, 1.0)))


def guards(noise: Noise, *, least: float) -> Iterator[Guard]:
    """Every number that is judged, ``rel_l2`` first; ``least`` is the smallest noise floor to go by."""
    twin, candidate = noise.twin, noise.candidate
    whole = max(twin.whole, least)
    lift = whole / twin.whole if twin.whole else 1.0
    rows, channels = noise.even_rows, noise.even_channels
    wide, tall = min(PEAKED * channels, noise.features, DEGREES), min(rows, DEGREES)
    yield Guard("rel_l2", candidate.whole, whole, chance(rows * wide))
    yield Guard("typical_rel_l2", *_typical(twin, candidate, least=least), chance(noise.rows * wide))
    yield _worst("position_rel_l2", candidate.row, twin.row, lift=lift, least=least, numbers=wide)
    yield _worst("channel_rel_l2", candidate.channel, twin.channel, lift=lift, least=least, numbers=tall)
    for metric, numbers, share in (
        ("row_scale", rows, 1 / math.sqrt(channels)),
        ("channel_scale", min(channels, CHANNEL_DEGREES), 1 / math.sqrt(rows)),
        ("channel_bias", min(channels, CHANNEL_DEGREES), 1 / math.sqrt(rows)),
    ):
        floor = max(getattr(twin, metric) * lift, max(share, LEAST_PART) * whole)
        yield Guard(metric, getattr(candidate, metric), floor, chance(numbers))
    share = max(LEAST_SCALE[0], LEAST_SCALE[1] / math.sqrt(rows * channels))
    yield Guard("scale", abs(candidate.scale), max(abs(twin.scale) * lift, share * whole), SCALE * chance(rows * wide))


def _typical(twin: Spread, candidate: Spread, *, least: float) -> tuple[float, float]:
    """Geometric means of both sides' rows, none of them taken for less than ``least``."""
    ours, theirs = (math.exp(float(np.log(np.maximum(s.row, least)).mean())) for s in (candidate, twin))
    return ours, theirs


def _worst(
    metric: str, ours: array[float], theirs: array[float], *, lift: float, least: float, numbers: float
) -> Guard:
    """The row or channel furthest beyond its own floor, which is the twin's there, or at the median one."""
    typical = max(float(np.sort(theirs)[len(theirs) // 2]) * lift, least)
    floors = np.maximum(np.multiply(theirs, lift), typical)
    at = int(np.argmax(ours / floors))
    return Guard(metric, ours[at], float(floors[at]), chance(numbers))


def beyond_floor(noise: Noise, *, dtype: str, factor: float = FACTOR, draws: PointDraws | None = None) -> list[bool]:
    """For each row whether the candidate's error there is beyond ``factor`` times the floor: of ``draws``, if any."""
    rows = noise.twin.row if draws is None else np.sqrt(np.square(draws.row).mean(0)).tolist()
    least = max(half_ulp(dtype), sorted(rows)[noise.rows // 2])
    return [not c <= factor * max(w, least) for c, w in zip(noise.candidate.row, rows, strict=True)]


def _exact(measured: Measurement, dtype: str) -> Judged:
    """A point where the reference makes no error: so may a candidate not, but for a few units in the last place."""
    limit = 2 * half_ulp(dtype)
    source = f"the reference has no noise here: {ULPS:g} ULP of {dtype}"
    if measured.max_ulp > ULPS or measured.rel_l2 <= limit:
        failed, numbers = measured.max_ulp > ULPS, ("max_ulp", measured.max_ulp, ULPS)
    else:
        failed, numbers = True, ("rel_l2", measured.rel_l2, limit)
        source = f"the reference has no noise here: 2 x half an ULP of {dtype}"
    metric, value, allowed = numbers
    verdict: Verdict = "fail" if failed else "pass"
    return Judged(verdict=verdict, metric=metric, value=value, allowed=allowed, floor=0.0, source=source, dtype=dtype)


def _drawn_source(guard: Guard, *, factor: float) -> str:
    return f"{factor:g} x noise floor of the draws, {guard.chance:.2g} x for chance"


def _source(guard: Guard, *, factor: float, lifted: bool, pooled: float) -> str:
    times, more = (SCALE, guard.chance / SCALE) if guard.metric == "scale" else (1.0, guard.chance)
    text = f"{factor * times:g} x noise floor"
    if lifted:
        text += " of its neighbours" if pooled else " (half an ULP)"
    return f"{text}, {more:.2g} x for chance" if more >= 1.1 else text
