"""Guards from an ensemble: each number of a candidate's beside what the same number is over the draws.

The logarithm of such a number is taken to be normal over legitimate ways to compute. Its mean is that of the draws. Its
variance is estimated from few draws, so it is moderated by one that is known before (``PRIOR`` degrees of freedom), as
is done where many variances are estimated from few numbers each (Smyth, 2004, doi 10.2202/1544-6115.1027). A new number
is then beyond ``mean + t * spread`` with the chance that Student's ``t`` was chosen for. A signed factor has no
logarithm: its square's mean takes the variance's place. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist

import msgspec
import numpy as np

from paritykit.comparison.ensemble import PointDraws
from paritykit.comparison.guard import CHANNEL_DEGREES, DEGREES, LEAST_PART, PEAKED, Guard
from paritykit.comparison.noise import Floats, Noise, median

PRIOR = 10.0
"""Degrees of freedom of the variance that is known before: between the draws of five tiny models, 1,600 points in
float32 and bfloat16, variances scatter as if it had 4 to 34."""
WORST_CHANNEL, OWN_SCALE = 2, 2
"""Independent numbers beside those of a single channel, or of factors; the worst row counts as a single one. Between
draws the variance of the worst row's, the worst channel's and the factors' was 0.08 to 0.24, 0.05 to 0.09 and 0.30 to
0.54 of one over those numbers (medians, same points), but other ways to sum differ more: a token of a correct attention
was 3.7 times the draws."""
FEW = 50.0
"""Independent numbers that are taken to be there at least, where draws differ. Where a sink has all the energy there
are fewer, and how far these scatter the draws say: trained models have many such points, most of them calm."""
LEAST_FACTOR = 0.01
"""A constant factor scatters by this share of the whole error at least, however many numbers it is made of."""
TRUNCATED = 2 * 1.8
"""Some kernels of products cut what they store where others round it to nearest (vLLM's attention on a CPU without
bfloat16 instructions, of shares and of outputs), which makes all of it smaller by half a unit in the last place each
time: by 1.8 times the root mean square of one rounding. Where all tokens are alike that is an offset of each channel's
own, and what is computed from it has factors and offsets of its rows and channels. Where no rounding was drawn,
a cut is told from a factor: see ``cutting``."""
SAME_ROW = 1e-3
"""Rows whose squared errors differ by less than this share in every draw err as one: of a text that repeats one token
they differ by 1e-4, since the truth rounds too."""
GUARDS = 8
RUN_CHANCE = 1e-4
"""Chance that a whole run fails though all is computed rightly. Where modules are replayed too it takes two: a number
beyond its limit in the free run, and one on the reference's own values, whose roundings are others. Each of both looks
then has the root of it."""


@lru_cache(maxsize=1024)
def quantile(chance: float, degrees: float) -> float:
    """How many spreads a new number is beyond the mean with this chance, one-sided: Student's t.

    By Wallace's approximation to the normal (1959, doi 10.1214/aoms/1177706199), within a few percent here.

    >>> round(quantile(0.001, 10), 1), round(quantile(1e-8, 17), 1)
    (4.2, 9.9)
    """
    z = NormalDist().inv_cdf(1 - max(chance, 1e-15)) * (8 * degrees + 3) / (8 * degrees + 1)
    return math.sqrt(degrees * math.expm1(z * z / degrees))


def each_chance(comparisons: int, *, looks: int = 1) -> float:
    """The chance that is left to each number of a run with so many points and cases, of which it takes ``looks``.

    >>> print(f"{each_chance(1000):.3g} {each_chance(1000, looks=2):.3g}")
    1.25e-08 1.25e-06
    """
    return float(RUN_CHANCE ** (1 / looks)) / (GUARDS * max(comparisons, 1))


def drawn_guards(noise: Noise, draws: PointDraws, *, least: float, chance: float) -> Iterator[Guard]:
    """Every number that is judged, ``rel_l2`` first; ``least`` is the smallest noise floor to go by."""
    candidate, typical = noise.candidate, np.maximum(draws.whole, least)
    whole = _mean(typical)
    distinct = _distinct(draws.squares)
    rows, channels = min(noise.even_rows, distinct), noise.even_channels
    wide, tall = min(PEAKED * channels, noise.features, DEGREES), min(rows, DEGREES)
    yield _guard("rel_l2", candidate.whole, typical, numbers=rows * wide, chance=chance)
    logs = np.log(np.maximum(draws.row, least)).mean(1)
    middle = math.exp(float(np.log(np.maximum(candidate.row, least)).mean()))
    yield _guard("typical_rel_l2", middle, np.exp(logs), numbers=min(noise.rows, distinct) * wide, chance=chance)
    yield _worst_row(np.asarray(candidate.row), draws.row, least=least, numbers=wide, chance=chance)
    floors = np.maximum(draws.channel, max(median(draws.channel), least))
    seen, numbers = np.asarray(candidate.channel), WORST_CHANNEL * tall
    yield _worst("channel_rel_l2", seen, floors, draws.numbers[0], numbers=numbers, chance=chance)
    bias = TRUNCATED * least if draws.differ else 0.0
    for metric, ours, found, numbers, share in (
        ("row_scale", _own(candidate.row_scale, candidate.scale), _own(draws.row_scale, draws.scale), rows, channels),
        ("channel_scale", _own(candidate.channel_scale, candidate.scale), _own(draws.numbers[1], draws.scale),
         min(channels, CHANNEL_DEGREES), rows),
        ("channel_bias", candidate.channel_bias, draws.numbers[2], min(channels, CHANNEL_DEGREES), rows),
    ):  # fmt: skip
        floor = np.maximum(found, max(1 / math.sqrt(share), LEAST_PART) * whole)
        guard = _guard(metric, float(ours), floor, numbers=OWN_SCALE * numbers, chance=chance)
        yield msgspec.structs.replace(guard, floor=max(guard.floor, bias / guard.chance))
    share = max(LEAST_FACTOR, 1 / math.sqrt(rows * channels))
    yield _signed("scale", candidate.scale, draws.scale, prior=share * whole, bias=bias, chance=chance)


def _distinct(squares: Floats) -> int:
    """Rows that err by themselves, of ``[draws, rows]`` squared errors: a row of a token that stands there again errs
    as that does, where no rounding was drawn.
    """
    logs = np.log(np.maximum(squares[:, np.argsort(squares[0])], np.finfo(np.float64).tiny))
    return 1 + int((np.abs(np.diff(logs, axis=1)).max(0) > SAME_ROW).sum())


def _own(scales: float | Floats, scale: float | Floats) -> Floats:
    """What rows' or channels' own factors are beside the one that all have: one projection lies inside the other."""
    found: Floats = np.sqrt(np.maximum(np.square(scales) - np.square(scale), 0.0))
    return found


def _guard(metric: str, value: float, drawn: Floats, *, numbers: float, chance: float) -> Guard:
    return Guard(metric, value, _mean(drawn), _beyond(np.log(drawn), numbers=numbers, chance=chance))


def _beyond(logs: Floats, *, numbers: float, chance: float) -> float:
    """How many times the typical number is allowed, from the logarithms of those drawn."""
    count = len(logs)
    least = FEW if float(np.ptp(logs)) > SAME_ROW else 1.0
    variance = (PRIOR / max(numbers, least) + float(((logs - logs.mean()) ** 2).sum())) / (PRIOR + count - 1)
    return math.exp(quantile(chance, PRIOR + count - 1) * math.sqrt(variance * (1 + 1 / count)))


def _worst_row(ours: Floats, drawn: Floats, *, least: float, numbers: float, chance: float) -> Guard:
    """The row furthest beyond what the draws do there; each draw is held against the others in the same way."""
    logs = np.log(np.maximum(drawn, least))
    count = len(logs)
    worst = [float((own - _floors((logs.sum(0) - own) / (count - 1))).max()) for own in logs]
    return _worst("position_rel_l2", ours, np.exp(_floors(logs.mean(0))), np.exp(worst), numbers=numbers, chance=chance)


def _floors(logs: Floats) -> Floats:
    """Of rows, in logarithms: no row's is below the median one's."""
    found: Floats = np.maximum(logs, median(logs))
    return found


def _worst(metric: str, ours: Floats, floors: Floats, worst: Floats, *, numbers: float, chance: float) -> Guard:
    """``worst``: by how much each draw's worst row or channel is beyond what the others do there."""
    at = int(np.argmax(ours / floors))
    usual = np.maximum(worst, 1.0)
    times = _mean(usual) * _beyond(np.log(usual), numbers=numbers, chance=chance)
    return Guard(metric, float(ours[at]), float(floors[at]), times)


def _signed(metric: str, value: float, drawn: Floats, *, prior: float, bias: float, chance: float) -> Guard:
    """A number about zero over the draws; ``prior`` is its spread as known before, ``bias`` is allowed in any case."""
    count, times = len(drawn), quantile(chance / 2, PRIOR + len(drawn))
    spread = math.sqrt((PRIOR * prior**2 + float((drawn**2).sum())) / (PRIOR + count))
    return Guard(metric, abs(value), max(spread, bias / times), times)


def _mean(drawn: Floats) -> float:
    """The geometric mean."""
    return math.exp(float(np.log(drawn).mean()))
