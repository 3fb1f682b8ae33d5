"""The terminal report: one screen by default, the same words as the failure text."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from paritykit.errors import UnknownNameError
from paritykit.reports.failure import LIMIT, Field, cause_text, failure_text, fields_of, gap_lists, judged, next_steps
from paritykit.reports.replayed import local, origin
from paritykit.reports.wording import SIDES, WORDS, extent, headline, number, shorten, sides, starts, state
from paritykit.results import Finding, Results

__all__ = ["failure_text", "print_summary", "render", "show_point"]

STYLES = {
    "pass": "bold green",
    "fail": "bold red",
    "error": "bold red",
    "inconclusive": "bold yellow",
    "nothing": "bold yellow",
    "skip": "dim",
}
VERBOSE_ROWS = 200


def print_summary(results: Results, *, console: Console, verbose: bool = False, report: str = "") -> None:
    """Print the verdict and what to do next in at most 25 lines; ``verbose`` adds every finding that is not a pass."""
    kind = state(results)
    head = Text(f"{WORDS[kind]}  ", style=STYLES[kind])
    head.append(headline(results), style="bold")
    _print(console, head)
    _print_field(console, ("sides", f"{sides(results)}   {results.run.candidate.model}"))
    engines = [("engines", shorten(starts(results), LIMIT))] if len(results.run.starts) > SIDES else []
    for field in [*fields_of(results), ("checks", _checks(results)), *engines, *next_steps(results, report=report)]:
        _print_field(console, field)
    if verbose:
        _print_rest(results, console)


def render(results: Results) -> bytes:
    """The summary as plain text without colour, for a log file."""
    buffer = io.StringIO()
    print_summary(results, console=Console(file=buffer, no_color=True, width=200), verbose=True)
    return buffer.getvalue().encode("utf-8", "backslashreplace")


def show_point(results: Results, point: str, *, console: Console) -> None:
    """Print every finding at ``point``: each case with all its metrics, what was allowed and why.

    Raises UnknownNameError with the nearest names where the run has no such point.
    """
    found = [f for f in results.findings if point in (f.point, f.located)]
    gaps = [(label, gap) for label, all_ in gap_lists(results).items() for gap in all_ if gap.point == point]
    if not found and not gaps:
        known = {f.point for f in results.findings} | {g.point for all_ in gap_lists(results).values() for g in all_}
        raise UnknownNameError("point", point, known)
    _print(console, Text(point, style="bold"))
    for label, gap in gaps:
        _print_field(console, (label, f"on the {gap.side} side: {gap.reason or 'reason unknown'}"))
    for finding in found:
        _print_finding(finding, console)


def _checks(results: Results) -> str:
    verdicts = {**dict.fromkeys(results.run.checks, "not run"), **results.summary.checks}
    return ", ".join(f"{name} {verdict}" for name, verdict in verdicts.items()) or "none"


def _print_rest(results: Results, console: Console) -> None:
    rest = [f for f in results.findings if f.verdict != "pass"]
    for finding in rest[:VERBOSE_ROWS]:
        place = shorten(f"{finding.check} / {finding.case} / {finding.point}", 200)
        whose = f"  {finding.origin}" if finding.origin else ""
        _print(console, Text(f"{WORDS[finding.verdict]:<12}", style=STYLES[finding.verdict]) + Text(place + whose))
        if finding.metric:
            _print_field(console, (finding.metric, judged(finding)))
    if len(rest) > VERBOSE_ROWS:
        _print(console, Text(f"and {len(rest) - VERBOSE_ROWS:,} more", style="dim"))


def _print_finding(finding: Finding, console: Console) -> None:
    head = Text(f"\n{WORDS[finding.verdict]}  ", style=STYLES[finding.verdict])
    _print(console, head + Text(" / ".join(part for part in (finding.check, finding.case) if part), style="bold"))
    for field in _fields(finding):
        _print_field(console, field)


def _fields(finding: Finding) -> list[Field]:
    fields = [
        ("shown at", finding.point if finding.located not in ("", finding.point) else ""),
        ("origin", origin(finding)),
        (finding.metric, judged(finding) if finding.metric else ""),
        ("local", local(finding)),
        ("extent", extent(finding)),
        ("detail", finding.message),
        *(("cause", cause_text(cause)) for cause in finding.causes),
        ("compared with", finding.candidate_point),
        ("mapping", finding.mapping),
        ("read as", finding.reading),
        ("shape", f"[{', '.join(map(str, finding.shape))}]" if finding.shape else ""),
        ("dtypes", " reference, ".join(finding.dtypes) + " candidate" if finding.dtypes else ""),
        *((name, number(value)) for name, value in sorted(finding.metrics.items())),
    ]
    return [field for field in fields if field[1]]


def _print_field(console: Console, field: Field) -> None:
    _print(console, Text(f"  {field[0]:<16}  ", style="dim") + Text(field[1]))


def _print(console: Console, text: Text) -> None:
    # Names may hold control characters; a terminal must not obey them.
    plain = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text.plain)
    safe = Text(plain, style=text.style, spans=text.spans if len(plain) == len(text.plain) else [])
    console.print(safe, soft_wrap=True, highlight=False)
