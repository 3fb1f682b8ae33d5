"""The words every report shares: numbers, verdict sentences, extents, the command that shows a failure again."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from urllib.parse import quote

from paritykit.results import Finding, Results, Side

WORDS = {
    "pass": "PASS",
    "fail": "FAIL",
    "error": "ERROR",
    "inconclusive": "INCONCLUSIVE",
    "nothing": "NOTHING COMPARED",
    "skip": "SKIPPED",
}
ORIGINS = {
    "introduced": "introduced here (its input is within tolerance)",
    "inherited": "inherited (its input is already beyond tolerance)",
}
_LAYER = re.compile(r"\.(\d{1,9})(?=[.#]|$)")
_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def state(results: Results) -> str:
    """The verdict of a run, or ``nothing`` where nothing was compared."""
    verdict = results.summary.verdict
    return "nothing" if results.summary.compared == 0 and verdict not in ("error", "fail") else verdict


def number(value: float | None) -> str:
    """A number in at most eight characters: ``3.1e-02``, ``0.98``, ``1,204``; a dash for none.

    >>> number(0.031), number(12.0), number(None)
    ('3.1e-02', '12', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size >= 1000 and size < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size == 0 or 0.1 <= size < 1000 else f"{value:.1e}"


def measured(finding: Finding) -> str:
    """The judged number; ``not finite`` where a failing metric has none (the records keep NaN as null)."""
    if finding.value is None and finding.metric and finding.verdict == "fail":
        return "not finite"
    return number(finding.value)


def source(finding: Finding) -> str:
    """Where the allowed number came from, in words."""
    return finding.allowed_source or "source not recorded"


def side_name(side: Side) -> str:
    """``vllm (bfloat16)``."""
    return f"{side.engine} ({side.dtype})"


def sides(results: Results) -> str:
    """``vllm (bfloat16) against hf (float32)``, or against itself where no other engine's numbers were judged."""
    candidate = side_name(results.run.candidate)
    alone = bool(results.findings) and all(f.condition for f in results.findings)
    return f"{candidate} against {'itself' if alone else side_name(results.run.reference)}"


SIDES = 3
"""Starts that a plain run has: the reference as truth and as twin, and the candidate."""


def starts(results: Results) -> str:
    """How often engines were started, and with which arguments; empty where nothing was counted."""
    found = results.run.starts
    if not found:
        return ""
    told = ", ".join(name if times == 1 else f"{name} x {times}" for name, times in found.items())
    return f"{count(sum(found.values()), 'start')}: {told}"


def count(amount: int, noun: str) -> str:
    """``1 point``, ``1,204 points``."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def headline(results: Results) -> str:
    """The verdict in one sentence, without its word: what was compared, and where it first differs."""
    summary, first = results.summary, results.summary.first_divergence
    compared = count(summary.compared, "comparison")
    kind = state(results)
    if kind == "nothing":
        return summary.message or "no point of the reference met a point of the candidate; this says nothing of parity"
    if kind == "pass":
        return f"all {compared} within tolerance" + (f"; {summary.message}" if summary.message else "")
    if kind == "fail":
        where = f"; first at {first.point}" + (f"; case {first.case}" if first.case else "") if first else ""
        return f"{summary.failed:,} of {compared}{where}"
    why = {"error": "the run could not finish its checks", "inconclusive": "too little was compared to say"}
    return f"{summary.message or why.get(kind, kind)} ({compared}, {summary.failed:,} failed)"


def first_finding(results: Results) -> Finding | None:
    """The finding that shows the first divergence, if the run has one."""
    first = results.summary.first_divergence
    if first is None:
        return None
    same = [f for f in results.findings if (f.check, f.case) == (first.check, first.case)]
    names = (first.seen_at, first.point) if first.seen_at else (first.point,)
    return next((f for name in names for f in same if name in (f.point, f.located)), None)


def worst_finding(findings: Sequence[Finding]) -> Finding | None:
    """The finding that uses most of its allowance, among those with both numbers."""
    judged = (f for f in findings if f.verdict != "skip" and not f.kind and headroom(f) is not None)
    return max(judged, key=lambda f: headroom(f) or 0.0, default=None)


def headroom(finding: Finding) -> float | None:
    """``value / allowed``: 1.0 is the limit. None without both numbers, or where nothing at all is allowed."""
    if finding.value is None or not finding.allowed:
        return None
    return finding.value / finding.allowed


def inherited_after(results: Results) -> int:
    """How many failing points of the first divergence's check and case only pass it on."""
    first = results.summary.first_divergence
    return sum(
        f.verdict == "fail"
        and f.origin == "inherited"
        and first is not None
        and (f.check, f.case) == (first.check, first.case)
        for f in results.findings
    )


def extent(finding: Finding) -> str:
    """What is beyond tolerance, of positions and of each: ``all tokens (0-39)``, ``tokens >= 32 only; head 1 of 4``."""
    return "; ".join(part for part in (_tokens(finding), parts(finding)) if part)


def parts(finding: Finding) -> str:
    """Which part of every row is wrong: ``rank 1 of 2; heads 2-3 of 4``. Empty where it is not only a part."""
    return "; ".join(s.describe() for s in finding.slices)


def _tokens(finding: Finding) -> str:
    """Which positions are beyond tolerance: ``all tokens``, ``tokens >= 32 only``, ``tokens 3, 8-11 of 0-39``."""
    if not finding.failing:
        return ""
    if finding.positions is not None:
        start, end = finding.positions
        if len(finding.failing) == 1:
            low, high = finding.failing[0]
            if low <= start and high >= end:
                return f"all tokens ({start}-{end})"
            if high >= end:
                return f"tokens >= {low} only (of {start}-{end})"
    of = f" of {finding.positions[0]}-{finding.positions[1]}" if finding.positions else ""
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in finding.failing[:6])
    more = f" and {len(finding.failing) - 6} more ranges" if len(finding.failing) > 6 else ""
    return f"tokens {shown}{more}{of}"


def layer(point: str) -> int | None:
    """The layer number in a point's name: 3 for ``model.layers.3.mlp``."""
    found = _LAYER.search(point)
    return int(found.group(1)) if found else None


def link_to(finding: Finding) -> str:
    """The fragment that opens the details of ``finding``."""
    return "#/point/" + "/".join(quote(part, safe="") for part in (finding.check, finding.case, finding.point))


def visible(text: str) -> str:
    """``text`` with line ends as spaces, and control and direction marks spelled out so that they act on nothing."""
    flat = text.replace("\r", "").replace("\n", " ")
    return _ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", flat)


def shorten(text: str, limit: int) -> str:
    """``text`` with its middle left out where it is longer than ``limit`` characters."""
    text = visible(text)
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
