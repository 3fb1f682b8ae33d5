"""The verdict of a run, and of each check in it. Torch-free.

A run that compared nothing, or too little, is never green.
"""

from __future__ import annotations

from collections.abc import Iterable

from paritykit.diagnose.locate import find_culprits, first_divergence, first_failure
from paritykit.results import Coverage, Finding, Summary, Verdict

COMPARED = ("pass", "fail", "inconclusive")
"""Verdicts of findings that two tensors were measured for."""


def check_verdict(coverage: Coverage, findings: Iterable[Finding], *, min_coverage: float) -> Verdict:
    """Skip where there was nothing to look at, for a reason; fail before error before inconclusive before pass.

    Inconclusive is also less than ``min_coverage`` of the reference's points. Those that are named alike count as not
    compared.
    """
    found = list(findings)
    verdicts = {f.verdict for f in found}
    for worst in ("fail", "error", "inconclusive"):
        if worst in verdicts:
            return worst
    if not coverage.points and coverage.skipped:
        return "skip"
    unmatched = sum(u.side == "reference" for u in coverage.unmatched)
    known = coverage.compared + unmatched + len({f.point for f in found if f.kind == "named_alike"})
    if not known or verdicts.isdisjoint(COMPARED) or coverage.compared / known < min_coverage:
        return "inconclusive"
    return "pass"


def summarise(
    checks: list[str],
    coverage: list[Coverage],
    findings: list[Finding],
    *,
    min_coverage: float,
    seconds: float | None = None,
) -> Summary:
    """The last record of a run."""
    verdicts = {
        c.check: check_verdict(c, [f for f in findings if f.check == c.check], min_coverage=min_coverage)
        for c in coverage
    }
    first = first_failure(findings)
    judged = [f for f in findings if f.verdict in COMPARED]
    verdict: Verdict = next((v for v in ("fail", "error", "inconclusive") if v in verdicts.values()), "pass")
    if not judged and verdict != "error":
        verdict = "inconclusive"
    return Summary(
        verdict=verdict,
        compared=len(judged),
        failed=sum(f.verdict == "fail" for f in findings),
        skipped=sum(len(c.skipped) for c in coverage),
        unmatched=sum(len(c.unmatched) for c in coverage),
        errors=sum(f.verdict == "error" for f in findings),
        inconclusive=sum(f.verdict == "inconclusive" for f in findings),
        first_divergence=first_divergence(findings),
        culprits=find_culprits(findings),
        causes=first.causes if first else [],
        checks={name: verdicts[name] for name in checks},
        message=_message(verdicts, coverage, findings),
        seconds=seconds,
    )


def _message(verdicts: dict[str, Verdict], coverage: list[Coverage], findings: list[Finding]) -> str:
    if not any(f.verdict in COMPARED for f in findings):
        return "nothing was compared"
    unsure = next((f for f in findings if f.verdict == "inconclusive"), None)
    if unsure is not None:
        return f"{unsure.point}: {unsure.message}"
    thin = [c for c in coverage if verdicts[c.check] == "inconclusive"]
    return "; ".join(f"{c.check}: only {c.compared} of {c.points} points were compared" for c in thin)
