"""What two correct engines may differ by at a point, read off the findings that were judged there. Torch-free."""

from __future__ import annotations

import math

from paritykit.comparison.floor import FACTOR, chance, half_ulp
from paritykit.comparison.guard import DEGREES
from paritykit.comparison.tolerance import POSITION_FACTOR, Tolerance, coarser, fallback
from paritykit.results import Finding


def allowed_of(findings: list[Finding], floor: float) -> Tolerance:
    """What was allowed at a point, from how it was judged: the most of all cases, whose rows are held together."""
    if floor:
        return Tolerance(FACTOR * floor, FACTOR * floor * chance(DEGREES), findings[0].allowed_source)
    judged = [f for f in findings if f.allowed and f.metric in ("rel_l2", "position_rel_l2")]
    limits = [f.allowed if f.metric == "rel_l2" else f.allowed / POSITION_FACTOR for f in judged if f.allowed]
    whole = max(limits, default=fallback(_dtype(findings[0]), depth=findings[0].order))
    return Tolerance(whole, whole * POSITION_FACTOR, findings[0].allowed_source)


def floor_of(finding: Finding) -> float:
    """Noise of a whole point, whatever number it was judged by; 0 where none was measured."""
    ratio, error = finding.metrics.get("floor_ratio", 0.0), finding.metrics.get("rel_l2")
    if not error or ratio == 0.0:  # not measured, or nothing of it is a number
        return 0.0
    return max(error / ratio if ratio else 0.0, half_ulp(_dtype(finding)))


def pooled_floor(findings: list[Finding]) -> float:
    """The noise floor of all cases' rows together."""
    rows = [(f.shape[0] if f.shape else 1, floor_of(f)) for f in findings]
    known = [(n, floor) for n, floor in rows if floor]
    return math.sqrt(sum(n * floor**2 for n, floor in known) / sum(n for n, _ in known)) if known else 0.0


def _dtype(finding: Finding) -> str:
    """What the candidate stores the point in."""
    return coarser(finding.dtypes) if finding.dtypes else "float32"
