"""The rows of the findings table: every finding, and everything that was not compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from paritykit.results import Coverage, Finding, Results, Unmatched

STATUSES = ("fail", "error", "inconclusive", "unmatched", "notrun", "skip", "pass")
LETTERS = {"fail": "F", "error": "E", "inconclusive": "I", "unmatched": "U", "notrun": "N", "skip": "S", "pass": "P"}
LABELS = {
    "fail": "fail", "error": "error", "inconclusive": "inconclusive", "unmatched": "unmatched", "notrun": "not run",
    "skip": "skipped", "pass": "pass",
}  # fmt: skip


class Row(NamedTuple):
    """One line of the table: a finding, or a gap told as one."""

    status: str
    finding: Finding


def rows_of(results: Results) -> list[Row]:
    """All rows in the order of the records: findings first, then what was left out."""
    found = [Row(f.verdict, f) for f in results.findings]
    for coverage in results.coverage:
        found += [Row("unmatched", _gap(coverage, u)) for u in coverage.unmatched]
        found += [Row("skip", _gap(coverage, u)) for u in coverage.skipped]
    return found + [Row("notrun", f) for f in _not_run(results)]


def tally(rows: list[Row]) -> dict[str, int]:
    """How many rows have each status."""
    counts = dict.fromkeys(STATUSES, 0)
    for row in rows:
        counts[row.status] += 1
    return counts


def _gap(coverage: Coverage, gap: Unmatched) -> Finding:
    side = f"{gap.side} side: {gap.reason or 'reason unknown'}"
    return Finding(check=coverage.check, case="", point=gap.point, verdict="skip", message=side)


def _not_run(results: Results) -> Iterator[Finding]:
    covered = {c.check for c in results.coverage} | {f.check for f in results.findings}
    for check in results.run.checks:
        if check not in covered:
            message = "requested, but the run has no finding of it"
            yield Finding(check=check, case="", point="(every point)", verdict="skip", message=message)
    for coverage in results.coverage:
        alike = {f.point for f in results.findings if f.check == coverage.check and f.kind == "named_alike"}
        missing = _missing(coverage) - len(alike)
        if missing > 0:
            message = "points of the reference that no record accounts for"
            yield Finding(check=coverage.check, case="", point=f"({missing:,} points)", verdict="skip", message=message)


def _missing(coverage: Coverage) -> int:
    told = sum(u.side == "reference" for u in (*coverage.skipped, *coverage.unmatched))
    return coverage.points - coverage.compared - told
