"""Rounding that added up: points beyond the floor in the free run, where every module is right by itself.

An error grows on its way through a model, by chance more than the floor allows now and then. Where the candidate was
replayed on the reference's own values and no module is wrong on them, such a point is no failure, provided that what
the model gives (logits, tokens, caches) is within its own limits. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from paritykit.captures.manifest import CACHE_PORTS, split_key
from paritykit.results import Finding

INTERNAL = "modules"
"""The check whose points lie on the way; every other looks at what a model gives."""
NUMBERLESS = ("shape", "mapping")
"""Metrics of failures that no number was measured for."""


def accumulate(findings: list[Finding], *, replayed: Iterable[str]) -> list[Finding]:
    """``findings`` with those that only added up passed, by case, as *accumulated*; ``replayed`` are cases' ids."""
    if any(f.local is not None and f.local.culprit for f in findings):
        return findings
    cases = set(replayed) - {f.case for f in findings if _gives(f) and f.verdict in ("fail", "error")}
    local = {(f.case, f.point): f.local.verdict for f in findings if f.local is not None}
    return [_passed(f) if f.case in cases and _added_up(f, local) else f for f in findings]


def _gives(finding: Finding) -> bool:
    """Whether a finding is about what the model gives, or keeps."""
    return finding.check != INTERNAL or split_key(finding.point)[1] in CACHE_PORTS


def _added_up(finding: Finding, local: Mapping[tuple[str, str], str]) -> bool:
    """Whether it fails in the free run, and the point or the nearest module around it that was looked at is right."""
    if finding.verdict != "fail" or finding.check != INTERNAL or finding.metric in NUMBERLESS:
        return False
    around = split_key(finding.point)[0]
    scopes = [finding.point, around]
    while around:
        around = around.rpartition(".")[0]
        scopes.append(around)
    seen = next((local[finding.case, s] for s in scopes if (finding.case, s) in local), "")
    return seen == "pass"


def _passed(finding: Finding) -> Finding:
    text = "rounding that added up: it is right on the reference's own values, and so is every module"
    message = "; ".join(filter(None, (finding.message, text)))
    return msgspec.structs.replace(
        finding, verdict="pass", kind="accumulated", origin=None, located="", failing=[], message=message
    )
