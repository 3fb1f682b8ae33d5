"""Rounding that added up: how many points, and where it is most, in one sentence."""

from __future__ import annotations

from paritykit.reports.wording import count, headroom, measured, number, shorten
from paritykit.results import Results

LIMIT = 200


def added_up(results: Results) -> str:
    """The sentence; empty where nothing did."""
    found = [f for f in results.findings if f.kind == "accumulated"]
    if not found:
        return ""
    worst = max(found, key=lambda f: headroom(f) or 0.0)
    place = shorten(" / ".join(filter(None, (worst.point, worst.case))), LIMIT)
    return (
        f"rounding of {count(len(found), 'point')} added up beyond the floor, most at {place}: "
        f"{worst.metric} {measured(worst)}, allowed {number(worst.allowed)}; "
        "every module is right on the reference's own values"
    )
