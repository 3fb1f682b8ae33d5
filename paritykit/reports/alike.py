"""Points whose name means two things: which, what they were compared with, and the reading that fits, if one does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from paritykit.provenance.names import NUMBER, pattern
from paritykit.reports.landings import joined
from paritykit.reports.wording import headroom, measured, number, shorten
from paritykit.results import Finding, Results

TITLE = "Named alike, means something else"
UNREAD = "none fits: not judged; nothing that is computed from it differs"
LIMIT = 200
SHOWN = 2


class Meaning(NamedTuple):
    """One kind of point, over its layers and cases. ``how`` is the reading; the number is that of the worst finding."""

    point: str
    candidate: str
    how: str
    judged: bool
    metric: str
    value: str
    allowed: str
    findings: int

    @property
    def verdict(self) -> str:
        """``pass`` or ``fail`` where it is judged by its reading, else that it is not."""
        return "by this reading" if self.judged else "not judged"


def meanings(results: Results) -> list[Meaning]:
    """Every kind of point that is read in another way or is named alike, in order of execution."""
    groups: dict[tuple[str, int, str], list[Finding]] = defaultdict(list)
    for f in results.findings:
        if f.means_another:
            groups[pattern(f.point), len(NUMBER.findall(f.point)), pattern(f.reading)].append(f)
    return [_meaning(found) for found in groups.values()]


def _meaning(found: list[Finding]) -> Meaning:
    worst = max(found, key=lambda f: headroom(f) or 0.0)
    return Meaning(
        point=_together(f.point for f in found),
        candidate=_together(f.candidate_point for f in found),
        how=_together(f.reading for f in found),
        judged=worst.kind != "named_alike",
        metric=worst.metric,
        value=measured(worst),
        allowed=number(worst.allowed),
        findings=len(found),
    )


def _together(names: Iterable[str]) -> str:
    """One name for several; the first where they differ in more than numbers."""
    told = list(dict.fromkeys(names))
    same = len({(pattern(name), len(NUMBER.findall(name))) for name in told}) == 1
    return joined(told) if same else told[0]


def alike_fields(results: Results) -> list[tuple[str, str]]:
    """The meanings as labelled lines: at most two, and how many more."""
    found = meanings(results)
    lines = [("read as" if m.judged else "named alike", shorten(_line(m), LIMIT)) for m in found[:SHOWN]]
    return [*lines, ("", f"and {len(found) - SHOWN:,} more")] if len(found) > SHOWN else lines


def alike_lines(findings: list[Finding]) -> list[str]:
    """One line for each finding of a point that is read in another way or is named alike."""
    told = [f for f in findings if f.means_another]
    return [f"{shorten(f.point, LIMIT)}   {f.reading or UNREAD}" for f in told]


def _line(meaning: Meaning) -> str:
    return f"{meaning.point}: {meaning.how or UNREAD} ({meaning.metric} {meaning.value}, allowed {meaning.allowed})"
