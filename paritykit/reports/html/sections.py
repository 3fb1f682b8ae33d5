"""The lower sections: generated tokens, what was left out, tolerances used, environment."""

from __future__ import annotations

from collections import defaultdict
from itertools import zip_longest
from typing import NamedTuple

from paritykit.reports.html.rows import Row
from paritykit.reports.wording import headroom, shorten
from paritykit.results import CaseInfo, Finding, Results

CASES = 24
TOKENS = 12
GAPS = 150
POLICIES = 60


class Tokens(NamedTuple):
    """Both generated lines of one case, around their first difference."""

    case: str
    prompt: int
    batch: int
    first: int | None
    start: int
    pairs: list[tuple[str, str]]
    more: int
    words: str


class Gap(NamedTuple):
    """A point that was not compared, and why."""

    status: str
    check: str
    point: str
    reason: str


class Policy(NamedTuple):
    """One source of tolerances: how often it was used, and how near the worst point came."""

    check: str
    metric: str
    source: str
    used: int
    failed: int
    worst: float | None
    worst_point: str


def tokens_of(results: Results) -> tuple[list[Tokens], int]:
    """Cases with generated tokens, those that differ first, and how many are not shown."""
    told = [_tokens(c) for c in results.cases if c.reference_tokens or c.candidate_tokens]
    told.sort(key=lambda t: t.first is None)
    return told[:CASES], max(0, len(told) - CASES)


def _tokens(case: CaseInfo) -> Tokens:
    both = list(zip_longest(case.reference_tokens, case.candidate_tokens))
    first = next((i for i, (a, b) in enumerate(both) if a != b), None)
    start = max(0, (first or 0) - TOKENS // 2)
    shown = [(_token(a), _token(b)) for a, b in both[start : start + TOKENS]]
    if first is None:
        words = f"all {len(both):,} tokens are the same"
    else:
        same = sum(a == b for a, b in both)
        place = f"generated token {first} (position {len(case.tokens) + first})"
        words = f"first difference at {place}; {same} of {len(both)} agree"
    return Tokens(case.id, len(case.tokens), case.batch, first, start, shown, len(both) - start - len(shown), words)


def _token(token: int | None) -> str:
    return "none" if token is None else str(token)


def gaps_of(rows: list[Row]) -> tuple[list[Gap], int]:
    """Everything that was not compared, unexplained first, and how many more there are."""
    told = [r for r in rows if r.status in ("unmatched", "notrun") or (r.status == "skip" and not r.finding.metric)]
    told.sort(key=lambda r: ("unmatched", "notrun", "skip").index(r.status))
    shown = [Gap(r.status, r.finding.check, shorten(r.finding.point, 300), r.finding.message) for r in told[:GAPS]]
    return shown, max(0, len(told) - GAPS)


def policies_of(results: Results) -> list[Policy]:
    """Each tolerance in use with its source, the tightest headroom first."""
    groups: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for finding in results.findings:
        if finding.metric and finding.verdict != "skip":
            groups[finding.check, finding.metric, finding.allowed_source or "source not recorded"].append(finding)
    told = [_policy(key, found) for key, found in groups.items()]
    return sorted(told, key=lambda p: -(p.worst or 0.0))[:POLICIES]


def _policy(key: tuple[str, str, str], found: list[Finding]) -> Policy:
    worst = max(found, key=lambda f: headroom(f) or 0.0)
    failed = sum(f.verdict == "fail" for f in found)
    return Policy(*key, len(found), failed, headroom(worst), shorten(worst.point, 300))
