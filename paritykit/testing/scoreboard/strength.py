"""How strong a fault must be to show so many times above the noise floor, at its own point."""

from __future__ import annotations

import math
from collections.abc import Callable

from paritykit.captures.reader import Capture
from paritykit.checks.base import LOGITS, Subject
from paritykit.checks.measured import measure_point
from paritykit.comparison.ensemble import Ensemble
from paritykit.comparison.floor import half_ulp
from paritykit.results import Finding

NEAR = 1.3
"""How far from the ratio that is wanted, as a factor, is near enough."""
TRIES = 6
SEEN, FLAT = 0.5, 0.2
"""What must be added to the noise, in units of it, to say how it grows; a slope below which nothing does."""
LEAST = 1e-8
"""No fault is planted more weakly than that."""


def ratio_at(subject: Subject, point: str) -> float | None:
    """The candidate's error over the noise floor at a point, in the case where that is largest.

    The floor is half a unit in the last place at least. None where no number is measured: no rule for the point,
    positions that are missing, or an error that is not finite.
    """
    rule = next((r for r in subject.mapping.rules if r.reference == point), None)
    if rule is None:
        return None
    check = "logits" if point == LOGITS else "modules"
    found = [measure_point(subject, rule, case, check=check) for case in subject.reference.cases]
    ratios = [_ratio(f) for f in found if f.verdict != "skip"]
    return max(ratios) if ratios and all(map(math.isfinite, ratios)) else None


def _ratio(finding: Finding) -> float:
    """NaN where the candidate lacks positions, or has a NaN or Inf of its own."""
    error, times = finding.metrics.get("rel_l2"), finding.metrics.get("floor_ratio")
    if error is None or times is None or finding.dtypes is None or finding.metric == "nonfinite_mismatch":
        return math.nan
    floor = error / times if times and math.isfinite(times) else 0.0
    return error / max(floor, half_ulp(finding.dtypes[1]))


def find_strength(measure: Callable[[float], float | None], *, target: float, full: float) -> tuple[float, float]:
    """(strength, the ratio it gives), as near ``target`` as a few tries get; ``full`` is the ratio at strength 1.

    What a fault adds is taken to grow as a power of its strength, and to add to the noise as independent errors do:
    ``ratio ** 2 = 1 + added ** 2``.
    """
    tried = [(1.0, full)]
    strength = _beyond(target) / _beyond(full)
    for _ in range(TRIES):
        strength = min(max(strength, LEAST), 1.0)
        reached = measure(strength)
        if reached is None:
            break
        tried.append((strength, reached))
        if _off(reached, target) <= NEAR:
            break
        strength = _between(tried, target)
    return min(tried, key=lambda t: _off(t[1], target))


def _off(reached: float, target: float) -> float:
    return max(reached / target, target / reached) if reached else math.inf


def _beyond(ratio: float) -> float:
    """What is added to the noise, in units of it."""
    return math.sqrt(max(ratio * ratio - 1, 1e-4))


def _between(tried: list[tuple[float, float]], target: float) -> float:
    """Where the power law through the nearest two reaches the target; half way between them where one is all noise."""
    above = min((t for t in tried if t[1] >= target), default=tried[0])
    below = max((t for t in tried if t[1] < target), default=None)
    other = below if below is not None and _beyond(below[1]) > SEEN else _second(tried, above)
    if other is None:
        assert below is not None
        return math.sqrt(below[0] * above[0])
    (x0, y0), (x1, y1) = ((math.log(s), math.log(_beyond(r))) for s, r in (other, above))
    slope = (y1 - y0) / (x1 - x0)
    found = math.exp(x1 + (math.log(_beyond(target)) - y1) / slope) if slope > FLAT else above[0] / 10
    return found if below is None or below[0] < found else math.sqrt(below[0] * above[0])


def _second(tried: list[tuple[float, float]], above: tuple[float, float]) -> tuple[float, float] | None:
    """The next stronger one that was tried."""
    return min((t for t in tried if t[0] > above[0]), default=None)


def subject_of(truth: Capture, twin: Capture, candidate: Capture, *, ensemble: Ensemble | None = None) -> Subject:
    """The captures as checks look at them, by the noise floor alone."""
    from paritykit.mapping.build import build_mapping

    mapping = build_mapping(truth.manifest, candidate.manifest)
    return Subject(reference=truth, candidate=candidate, mapping=mapping, twin=twin, ensemble=ensemble)
