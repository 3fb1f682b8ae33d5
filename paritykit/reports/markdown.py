"""Markdown for ``$GITHUB_STEP_SUMMARY``: the verdict, the first divergence, then what failed and what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from paritykit.reports.alike import TITLE, UNREAD, meanings
from paritykit.reports.failure import failure_text, gap_lists
from paritykit.reports.landings import is_wrong
from paritykit.reports.wording import (
    WORDS,
    count,
    headline,
    headroom,
    measured,
    number,
    shorten,
    sides,
    source,
    state,
)  # fmt: skip
from paritykit.results import Finding, Results, WeightRow

BUDGET = 900_000
WEIGHT_ROWS = 30
ICONS = {"pass": "✅", "fail": "❌", "error": "⚠️", "inconclusive": "❔", "nothing": "❔", "skip": "⚪"}
_PLAIN = re.compile(r"[\w.#\-/: ]+", re.ASCII)
_ESCAPES = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|`*_[]~\\#@!"})


def render(results: Results) -> bytes:
    """The run as GitHub Markdown, at most 900,000 bytes; rows beyond that are counted, not shown."""
    kind = state(results)
    head = [
        f"## {ICONS[kind]} {WORDS[kind]}: {_text(headline(results), 600)}",
        "",
        f"{_text(sides(results))}, model {_text(results.run.candidate.model)}",
        "",
        *_block(failure_text(results)),
        *_checks(results),
    ]
    parts = [_notes(results), _failing(results), _alike(results), _weights(results), _gaps(results)]
    return _fit(head, parts)


def _block(text: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in _ticks(text)), default=0))
    return [f"{fence}text", text, fence, ""]


def _ticks(text: str) -> Iterable[str]:
    return ("".join(c if c == "`" else " " for c in text)).split()


def _checks(results: Results) -> list[str]:
    verdicts = {**dict.fromkeys(results.run.checks, "not run"), **results.summary.checks}
    rows = [f"| {_name(name)} | {ICONS.get(v, '⚪')} {v} | {_tally(results, name)} |" for name, v in verdicts.items()]
    return ["| check | verdict | comparisons |", "|---|---|---|", *rows, ""] if rows else []


def _tally(results: Results, check: str) -> str:
    found = [f for f in results.findings if f.check == check]
    return f"{len(found):,}, {sum(f.verdict == 'fail' for f in found):,} failed"


def _notes(results: Results) -> list[str]:
    notes = [f"- {_text(note, 400)}" for note in results.summary.notes]
    return ["### Notes", "", *notes] if notes else []


def _failing(results: Results) -> list[str]:
    told = [f for f in results.findings if f.verdict not in ("pass", "skip")]
    told.sort(key=lambda f: (f.origin != "introduced", f.check, f.case, f.order))
    if not told:
        return []
    columns = ("verdict", "check", "case", "point", "metric", "measured", "allowed", "source", "noise floor")
    head = f"| {' | '.join((*columns, 'of allowed', 'local', 'origin'))} |"
    title = f"### {count(len(told), 'finding')} not within tolerance"
    return [title, "", head, "|" + "---|" * 12, *(_row(f) for f in told)]


def _row(finding: Finding) -> str:
    ratio = headroom(finding)
    cells = [
        finding.verdict, finding.check, finding.case, finding.point, finding.metric, measured(finding),
        number(finding.allowed), source(finding), number(finding.noise_floor),
        "-" if ratio is None else f"{ratio:.2f}", number(finding.local.value) if finding.local else "-",
        finding.origin or "-",
    ]  # fmt: skip
    return (
        "| "
        + " | ".join(_name(cell) if n in (1, 2, 3, 4) and cell else _text(cell) for n, cell in enumerate(cells))
        + " |"
    )


def _alike(results: Results) -> list[str]:
    """Names that mean two things, each with the reading that fits."""
    found = meanings(results)
    if not found:
        return []
    head = ["| point | compared with | read as | metric | measured | allowed | judged |", "|" + "---|" * 7]
    rows = [
        f"| {_name(m.point)} | {_name(m.candidate)} | {_text(m.how or UNREAD)} | {_name(m.metric)} | {_text(m.value)} "
        f"| {_text(m.allowed)} | {m.verdict} |"
        for m in found
    ]
    return [f"### {TITLE}", "", *head, *rows]


def _weights(results: Results) -> list[str]:
    """The first weights with which something is wrong; of those that landed as they should, nothing."""
    told = [row for row in results.weights if is_wrong(row)]
    if not told:
        return []
    rows = [_weight(row) for row in told[:WEIGHT_ROWS]]
    more = [f"| {len(told) - WEIGHT_ROWS:,} more |" + " |" * 6] if len(told) > WEIGHT_ROWS else []
    head = "| status | tensor | source slice | parameter | target slice | rank | what |"
    return [f"### {count(len(told), 'wrong landing')} of weights", "", head, "|" + "---|" * 7, *rows, *more]


def _weight(row: WeightRow) -> str:
    names = [_name(text) if text else "-" for text in (row.tensor, row.source, row.parameter, row.target)]
    rank = str(row.rank) if row.tensor and row.parameter else "-"
    return "| " + " | ".join([_text(row.status), *names, rank, _text(row.message)]) + " |"


def _gaps(results: Results) -> list[str]:
    rows = [
        f"| {label} | {gap.side} | {_name(gap.point)} | {_text(gap.reason or 'reason unknown')} |"
        for label, gaps in gap_lists(results).items()
        for gap in gaps
    ]
    return ["### Not compared", "", "| | side | point | reason |", "|---|---|---|---|", *rows] if rows else []


def _name(text: str) -> str:
    """A name as code where Markdown can hold it, else escaped."""
    return f"`{shorten(text, 200)}`" if _PLAIN.fullmatch(text) else _text(text)


def _text(text: str, limit: int = 200) -> str:
    """``text`` as one line that Markdown does not interpret."""
    return shorten(text, limit).translate(_ESCAPES)


def _fit(head: Sequence[str], sections: Sequence[list[str]]) -> bytes:
    lines, room = list(head), BUDGET - 200 - len("\n".join(head).encode("utf-8", "backslashreplace"))
    for section in sections:
        shown = 0
        for text in section:
            room -= len(text.encode("utf-8", "backslashreplace")) + 1
            if room < 0:
                break
            lines.append(text)
            shown += 1
        if shown < len(section):
            lines += ["", f"{len(section) - shown:,} more rows are left out to stay below GitHub's limit."]
            break
        lines.append("")
    return "\n".join(lines).rstrip("\n").encode("utf-8", "backslashreplace") + b"\n"
