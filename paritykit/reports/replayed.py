"""The words for local errors: what a module makes of the reference's own values, and who is wrong by itself."""

from __future__ import annotations

from collections import defaultdict

from paritykit.provenance.names import NUMBER, pattern
from paritykit.reports.landings import joined
from paritykit.reports.wording import ORIGINS, number, parts, shorten, state
from paritykit.results import Divergence, Finding, Results

REPLAYED = {
    "introduced": "introduced here (wrong on the reference's own values)",
    "inherited": "inherited (right on the reference's own values)",
}
"""Where a failure comes from, where its module was replayed."""
EXPLAINED = "inherited (what is wrong is before or inside it)"
ADDS_UP = "none: on the reference's own values every module is within tolerance, so small differences add up"
NOT_ASKED = "not known: only what the model gives was compared; --check modules tells which module is wrong"
LIMIT = 200


def origin(finding: Finding) -> str:
    """Who brought the failure about, and how that is known; empty where nobody asked."""
    if finding.origin is None:
        return ""
    if finding.local is None or finding.local.verdict == "error":
        return ORIGINS[finding.origin]
    if finding.origin == "inherited" and finding.local.verdict != "pass":
        return EXPLAINED
    return REPLAYED[finding.origin]


def local(finding: Finding) -> str:
    """The error on the reference's own values beside what was allowed; empty where it was not asked for."""
    found = finding.local
    if found is None:
        return ""
    if not found.metric:
        return f"not measured: {found.message}"
    value = "not finite" if found.value is None else number(found.value)
    words = f"{found.metric} {value}   allowed {number(found.allowed)}"
    return f"{words}   on the reference's own values, {found.level}"


def culprits(results: Results) -> list[tuple[str, str]]:
    """Modules that are wrong by themselves beside the first divergence, as labelled lines: at most two.

    The same module of several layers is one. One line says so where modules were replayed and none is.
    """
    found, first = results.summary.culprits, results.summary.first_divergence
    if not found:
        looked = {f.check for f in results.findings if f.local is not None and f.local.verdict != "error"}
        text = ADDS_UP if "modules" in looked else NOT_ASKED
        return [("culprits", text)] if looked and state(results) == "fail" else []
    groups = _alike([c for c in found if first is None or c.point != first.point])
    places = {(f.check, f.case, f.point): f for f in results.findings}
    names = [shorten(joined([c.point for c in group]), LIMIT) for group in groups]
    seen = [places.get((c.check, c.case, c.seen_at)) for c, *_ in groups]
    lines = [("also wrong", "    ".join(_told(name, f))) for name, f in zip(names, seen, strict=True)]
    if len(lines) > 2:
        rest = sum(len(group) for group in groups[1:])
        lines[1:] = [("also wrong", f"{rest} more: {shorten(', '.join(names[1:]), 2 * LIMIT)}")]
    return lines


def _told(name: str, finding: Finding | None) -> list[str]:
    return [name] if finding is None else [text for text in (name, local(finding), parts(finding)) if text]


def _alike(found: list[Divergence]) -> list[list[Divergence]]:
    """The same module of several layers together, in order of the first."""
    groups: dict[tuple[str, int], list[Divergence]] = defaultdict(list)
    for one in found:
        groups[pattern(one.point), len(NUMBER.findall(one.point))].append(one)
    return list(groups.values())
