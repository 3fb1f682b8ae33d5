"""The text of a failure: what, where, how much, extent, cause, next step. Plain lines, for terminals and pytest."""

from __future__ import annotations

import math

from paritykit.reports.added_up import added_up
from paritykit.reports.alike import alike_fields
from paritykit.reports.replayed import culprits, local, origin
from paritykit.reports.repro import repro, script
from paritykit.reports.wording import (
    ORIGINS,
    WORDS,
    count,
    extent,
    first_finding,
    headline,
    headroom,
    inherited_after,
    link_to,
    measured,
    number,
    shorten,
    side_name,
    sides,
    source,
    state,
    worst_finding,
)  # fmt: skip
from paritykit.results import Cause, Divergence, Finding, Results, Unmatched

Field = tuple[str, str]
NOTES = 4
"""Notes that a summary shows."""
LIMIT = 400
SHOWN_GAPS = 2
NEAR = 10.0
"""A policy that would let a failure pass is told up to this factor: beyond, it is no question of tolerance."""


def failure_text(results: Results, *, report: str = "") -> str:
    """Why a run is not a pass, in at most 25 plain lines; ``report`` is the path of an HTML report to point at.

    The order is: what, where, how much with what was allowed, extent, cause, next step.
    """
    fields = [*fields_of(results), *next_steps(results, report=report)]
    return "\n".join([what(results), *(line(f) for f in fields)])


def line(field: Field) -> str:
    """One indented line of a label and its text."""
    return f"  {field[0]:<16}  {field[1]}"


def what(results: Results) -> str:
    """The first line: which check and case differ between which sides, or the verdict in words."""
    first = results.summary.first_divergence
    if state(results) == "fail" and first is not None:
        subject = " / ".join(part for part in (first.check, first.case) if part)
        found = first_finding(results)
        candidate, reference = side_name(results.run.candidate), side_name(results.run.reference)
        if first.check == "reference" and found is not None:
            return f"{subject}: the reference {reference} differs from itself with {shorten(found.condition, LIMIT)}"
        if found is not None and found.condition:
            return f"{subject}: {candidate} differs from itself {shorten(found.condition, LIMIT)}"
        return f"{subject}: {candidate} differs from {reference}"
    return f"{WORDS[state(results)].lower()}: {headline(results)}  [{sides(results)}]"


def fields_of(results: Results) -> list[Field]:
    """Where, how much, extent, causes, what follows, and what was left out."""
    first = results.summary.first_divergence
    found: list[Field] = []
    if first is not None:
        found += _where(first, first_finding(results))
        found += [("cause", cause_text(c)) for c in results.summary.causes[:3]]
        found += culprits(results)
        after = inherited_after(results)
        if after:
            found.append(("after", f"{count(after, 'later point')} {'is' if after == 1 else 'are'} inherited"))
    else:
        found += closest(results)
    return found + left_out(results) + noted(results)


def noted(results: Results) -> list[Field]:
    """The notes of a run, the first few."""
    notes = results.summary.notes
    more = [("", f"and {len(notes) - NOTES} more notes")] if len(notes) > NOTES else []
    return [("note", shorten(note, LIMIT)) for note in notes[:NOTES]] + more


def closest(results: Results) -> list[Field]:
    """The point that uses most of its allowance, where any number was judged."""
    worst = worst_finding(results.findings)
    if worst is None:
        return []
    place = f"{worst.point} / {worst.case}" if worst.case else worst.point
    return [
        ("worst point", shorten(place, LIMIT)),
        (worst.metric, f"{judged(worst)}   {headroom(worst):.2f} of allowed"),
    ]


def _where(first: Divergence, finding: Finding | None) -> list[Field]:
    words = origin(finding) if finding is not None else ORIGINS.get(first.origin or "", "")
    found = [("first divergence", shorten(first.point, LIMIT) + (f"    {words}" if words and first.case else ""))]
    if finding is None:
        return found
    if finding.point != first.point:
        found.append(("seen at", shorten(finding.point, LIMIT)))
    if finding.candidate_point and (finding.mapping or finding.candidate_point != finding.point):
        found.append(("compared with", shorten(finding.mapping or finding.candidate_point, LIMIT)))
    if finding.metric:
        found.append((finding.metric, judged(finding)))
    if finding.local is not None:
        found.append(("local", shorten(local(finding), LIMIT)))
    if finding.message:
        found.append(("detail", shorten(finding.message, LIMIT)))
    name, value = next(iter(finding.needs.items()), ("", math.inf))
    if value <= NEAR:
        found.append(("would pass with", f"{name} = {number(value)} in a policy"))
    if extent(finding):
        found.append(("extent", extent(finding)))
    return found


def judged(finding: Finding) -> str:
    """The judged number beside what was allowed, why, and the noise floor."""
    parts = [measured(finding), f"allowed {number(finding.allowed)} ({source(finding)})"]
    floor = "not measured" if finding.noise_floor is None else number(finding.noise_floor)
    return "   ".join([*parts, f"noise floor {floor}"])


def cause_text(cause: Cause) -> str:
    """``PK102 sliding-window: evidence (confidence 0.98)``."""
    return f"{cause.code} {cause.name}: {shorten(cause.evidence, LIMIT)} (confidence {cause.confidence:.2f})"


def left_out(results: Results) -> list[Field]:
    """Skipped and unmatched counts, always; the first few names where there are any, and those that mean two things."""
    summary = results.summary
    counts = [f"compared {summary.compared:,}", f"failed {summary.failed:,}", f"skipped {summary.skipped:,}"]
    counts += [f"unmatched {summary.unmatched:,}"]
    counts += [f"errors {summary.errors:,}"] if summary.errors else []
    counts += [f"inconclusive {summary.inconclusive:,}"] if summary.inconclusive else []
    alike = sum(f.kind == "named_alike" for f in results.findings)
    counts += [f"named alike {alike:,}"] if alike else []
    added = added_up(results)
    found = [("counts", "   ".join(counts)), *([("accumulated", added)] if added else []), *alike_fields(results)]
    for label, gaps in gap_lists(results).items():
        found += [(label, _gap(g)) for g in gaps[:SHOWN_GAPS]]
        if len(gaps) > SHOWN_GAPS:
            found.append(("", f"and {len(gaps) - SHOWN_GAPS:,} more"))
    return found


def gap_lists(results: Results) -> dict[str, list[Unmatched]]:
    """Every skipped and every unmatched point, by label."""
    return {
        "unmatched": [u for c in results.coverage for u in c.unmatched],
        "skipped": [u for c in results.coverage for u in c.skipped],
    }


def _gap(gap: Unmatched) -> str:
    return f"{shorten(gap.point, LIMIT)} ({gap.side}): {gap.reason or 'reason unknown'}"


def next_steps(results: Results, *, report: str) -> list[Field]:
    """The command that shows it again, the same in Python for a drawn workload, and the place in the report."""
    command, first = repro(results), first_finding(results)
    found = [("repro", command)] if command else []
    if first is not None and first.workload:
        found += list(zip(("in Python", ""), script(results).splitlines(), strict=False))
    if report:
        found.append(("report", report + (link_to(first) if first else "")))
    return found
