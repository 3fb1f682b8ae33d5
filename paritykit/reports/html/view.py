"""What the first screen says, worked out in Python so that it reads with JavaScript off."""

from __future__ import annotations

import math
from typing import NamedTuple
from urllib.parse import quote

from paritykit.reports.failure import cause_text
from paritykit.reports.html.columns import spread
from paritykit.reports.html.rows import LABELS, LETTERS, Row
from paritykit.reports.replayed import culprits, local, origin
from paritykit.reports.wording import (
    extent,
    first_finding,
    headroom,
    inherited_after,
    link_to,
    measured,
    number,
    shorten,
    source,
    worst_finding,
)  # fmt: skip
from paritykit.results import Finding, Results, Side

MATRIX_CASES = 16
STATIC_ROWS = 40
NAME = 300


class Bar(NamedTuple):
    """One number on the log axis: ``percent`` is its length."""

    kind: str
    label: str
    text: str
    note: str
    percent: float


class Panel(NamedTuple):
    """The point the first screen is about: the first divergence, or the worst point of a run without one."""

    title: str
    point: str
    link: str
    facts: list[tuple[str, str]]
    metric: str
    bars: list[Bar]
    ticks: list[tuple[str, float]]


class SideRow(NamedTuple):
    """One property of both sides."""

    name: str
    reference: str
    candidate: str

    @property
    def differs(self) -> bool:
        """Whether the two sides say different things."""
        return self.reference != self.candidate


class Cell(NamedTuple):
    """One check of one case: the worst status of its findings."""

    letter: str
    status: str
    label: str
    query: str


class Matrix(NamedTuple):
    """Checks by cases; ``left_out`` cases have nothing worse than what is shown."""

    cases: list[str]
    rows: list[tuple[str, list[Cell]]]
    left_out: int


def panel_of(results: Results) -> Panel | None:
    """The first divergence, else the point that uses most of its allowance; None where no number was judged."""
    first, finding = results.summary.first_divergence, first_finding(results)
    if first is not None:
        title = "First divergence"
    else:
        title, finding = "Closest to its limit", worst_finding(results.findings)
        if finding is None:
            return None
    point = first.point if first else finding.located or finding.point if finding else ""
    bars, ticks = axis_of(finding) if finding else ([], [])
    facts = [(k, shorten(v, 2 * NAME)) for k, v in _facts(results, finding, point) if v]
    metric = finding.metric if finding else ""
    return Panel(title, shorten(point, NAME), link_to(finding) if finding else "", facts, metric, bars, ticks)


def _facts(results: Results, finding: Finding | None, point: str) -> list[tuple[str, str]]:
    first, causes = results.summary.first_divergence, results.summary.causes
    at = finding or first
    where = " / ".join(part for part in (at.check, at.case) if part) if at else ""
    facts = [
        ("where", where),
        ("origin", origin(finding) if first and finding else ""),
        ("seen at", finding.point if finding and finding.point != point else ""),
        ("local", local(finding) if finding else ""),
        ("extent", extent(finding) if finding else ""),
        ("detail", finding.message if finding else ""),
        *(("cause", cause_text(cause)) for cause in causes[:2]),
        *culprits(results),
        ("after", f"{inherited_after(results):,} later points are inherited" if inherited_after(results) else ""),
    ]
    ratio = headroom(finding) if finding and not first else None
    return [*facts, ("headroom", f"{ratio:.0%} of what is allowed" if ratio is not None else "")]


def axis_of(finding: Finding) -> tuple[list[Bar], list[tuple[str, float]]]:
    """Measured, allowed and noise floor as bars on whole decades, with the decades as ticks."""
    numbers = spread(finding)
    low = math.floor(math.log10(min(numbers))) - 1 if numbers else -1
    high = max(math.ceil(math.log10(max(numbers))), low + 1) if numbers else 0

    def place(value: float | None) -> float:
        if value is None or not math.isfinite(value):
            return 100.0 if finding.verdict == "fail" else 0.0
        return round(100 * (math.log10(value) - low) / (high - low), 2) if value > 0 else 0.0

    floor = number(finding.noise_floor) if finding.noise_floor is not None else "not measured"
    bars = [
        Bar(finding.verdict, "measured", measured(finding), "", place(finding.value)),
        Bar("allowed", "allowed", number(finding.allowed), source(finding), place(finding.allowed or 0.0)),
        Bar("floor", "noise floor", floor, "", place(finding.noise_floor or 0.0)),
    ]
    step = max(1, math.ceil((high - low) / 6))
    ticks = [(f"1e{d}", round(100 * (d - low) / (high - low), 2)) for d in range(low, high + 1, step)]
    return bars, ticks


LIBRARIES = {"hf": "transformers"}
"""Engines whose version is that of a library of another name."""


def sides_of(results: Results) -> list[SideRow]:
    """Every property of the two sides, in a fixed order, without those empty on both."""
    pairs = dict.fromkeys(_side(results.run.reference) | _side(results.run.candidate), ("", ""))
    reference, candidate = _side(results.run.reference), _side(results.run.candidate)
    found = [SideRow(name, reference.get(name, ""), candidate.get(name, "")) for name in pairs]
    return [row for row in found if row.reference or row.candidate]


def _side(side: Side) -> dict[str, str]:
    told = {
        "engine": " ".join(filter(None, (side.engine, side.versions.get(LIBRARIES.get(side.engine, side.engine))))),
        "model": side.model,
        "digest": side.digest,
        "dtype": side.dtype,
        "device": side.device,
        "attention": side.attention_backend,
        "parallel": ", ".join(f"{name} {size}" for name, size in sorted(side.parallel.items())),
    }
    told |= {name: version for name, version in sorted(side.versions.items()) if name not in told}
    return told | {f"arg {name}": value for name, value in sorted(side.args.items())}


def matrix_of(results: Results, rows: list[Row]) -> Matrix:
    """The worst status of each check and case; the worst cases first to be kept where there are too many."""
    worst: dict[tuple[str, str], str] = {}
    order = ("fail", "error", "inconclusive", "pass", "skip")
    for row in rows[: len(results.findings)]:
        key = (row.finding.check, row.finding.case)
        worst[key] = min(worst.get(key, row.status), row.status, key=order.index)
    cases = list(dict.fromkeys([*(c.id for c in results.cases), *(case for _, case in worst)]))
    rank = {case: min((order.index(s) for (_, c), s in worst.items() if c == case), default=9) for case in cases}
    kept = set(sorted(cases, key=lambda c: rank[c])[:MATRIX_CASES])
    shown = [case for case in cases if case in kept]
    checks = list(dict.fromkeys([*results.run.checks, *(check for check, _ in worst)]))
    cells = [(check, [_cell(check, case, worst.get((check, case), "notrun")) for case in shown]) for check in checks]
    return Matrix(shown, cells, len(cases) - len(shown))


def _cell(check: str, case: str, status: str) -> Cell:
    letter = "·" if status == "notrun" else LETTERS[status]
    query = f"k:{_quoted(check)}" + (f" c:{_quoted(case)}" if case else "")
    return Cell(letter, status, f"{check}, {case or 'whole run'}: {LABELS[status]}", "#/?q=" + quote(query, safe=":"))


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text


def static_rows(rows: list[Row]) -> list[Row]:
    """The rows shown before (or without) JavaScript: what failed in order, then what came closest."""
    told = [row for row in rows if row.status not in ("pass", "skip")]
    told.sort(key=lambda r: (r.status != "fail", r.finding.origin == "inherited", r.finding.order))
    rest = sorted((r for r in rows if r.status == "pass"), key=lambda r: -(headroom(r.finding) or 0.0))
    return [*told, *rest][:STATIC_ROWS]


def coverage_words(results: Results) -> list[tuple[str, str]]:
    """What each check met and missed, for a run that judged nothing."""
    return [
        (
            c.check,
            f"{c.points:,} points, {c.compared:,} compared, {len(c.skipped):,} skipped, {len(c.unmatched):,} unmatched",
        )
        for c in results.coverage
    ]
