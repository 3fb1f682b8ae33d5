"""From a property to its findings: every pair of runs compared, the worst of each point and case kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

import msgspec

from paritykit.checks.base import Answer
from paritykit.comparison.tolerance import Tolerance
from paritykit.errors import EngineError, UsageError
from paritykit.invariance.bound import EXACT, reordering
from paritykit.invariance.compare import Scene, compare_tokens, compare_views, left_out
from paritykit.invariance.laboratory import Laboratory
from paritykit.invariance.outside import stray_findings, unwatched
from paritykit.invariance.properties import PROPERTIES
from paritykit.invariance.ranks import PARAMETERS, replica_findings, weight_findings
from paritykit.invariance.trial import Arguments, Skipped, Twins
from paritykit.results import Coverage, Finding, Unmatched

SEVERITY = ("skip", "pass", "inconclusive", "error", "fail")


def judge_property(laboratory: Laboratory, name: str, *, only: Arguments | None = None) -> Answer:
    """What check ``name`` finds: one finding for each point and case, its worst over all conditions.

    With ``only`` the conditions are those that run the engine with these arguments.
    """
    findings: list[Finding] = []
    skipped: list[Unmatched] = []
    for twins in PROPERTIES[name](laboratory):
        if isinstance(twins, Skipped):
            skipped.append(Unmatched(side="candidate", point=twins.condition, reason=twins.reason))
            continue
        if only is not None and twins.varied.arguments != only:
            continue
        try:
            found, missing = compare_twins(laboratory, twins, check=name)
        except UsageError as error:
            skipped.append(Unmatched(side="candidate", point=twins.varied.name, reason=str(error)))
            continue
        except EngineError as error:
            found, missing = [_broken(name, twins, error)], []
        skipped += [m for m in missing if m not in skipped]
        findings += found
        if laboratory.brief and any(f.verdict == "fail" for f in found):
            break
    empty = Coverage(check=name, points=0, compared=0, skipped=skipped)
    return add_findings(Answer(coverage=empty, findings=[]), findings)


def arguments_of(laboratory: Laboratory, name: str) -> list[Arguments]:
    """The arguments with which check ``name`` runs the engine, each set once, in order."""
    found: list[Arguments] = []
    for twins in PROPERTIES[name](laboratory):
        if isinstance(twins, Twins) and twins.varied.arguments not in found:
            found.append(twins.varied.arguments)
    return found


def add_findings(answer: Answer, more: Iterable[Finding]) -> Answer:
    """``answer`` with more findings; of several about one point and case the worst is kept."""
    kept = {(f.case, f.point): f for f in answer.findings}
    for finding in more:
        _keep(kept, finding)
    compared = {point for _, point in kept}
    skipped = [m for m in answer.coverage.skipped if m.point not in compared]
    coverage = msgspec.structs.replace(answer.coverage, points=len(compared), compared=len(compared), skipped=skipped)
    return Answer(coverage=coverage, findings=sorted(kept.values(), key=lambda f: (f.case, f.order)))


def compare_twins(laboratory: Laboratory, twins: Twins, *, check: str) -> tuple[list[Finding], list[Unmatched]]:
    """The findings of two runs, and the points that only one of them shows. Raises UsageError, EngineError."""
    base = laboratory.view(twins.base)
    if twins.ranks and not laboratory.brief:
        with suppress(UsageError):
            laboratory.weights(twins.base)  # while its engine is open
    varied = laboratory.view(twins.varied)
    allow = partial(_allowed, exact=twins.exact, terms=laboratory.terms)
    found: list[Finding] = []
    for cases in twins.pairs:
        scene = Scene(
            base=base,
            varied=varied,
            cases=cases,
            graph=laboratory.graph,
            allow=allow,
            check=check,
            condition=twins.varied.name,
            partial=twins.partial or twins.varied.points is not None,
            routers=laboratory.routers,
        )
        choice = compare_tokens(scene)
        found += [*compare_views(scene), *([choice] if choice is not None else [])]
    missing = [] if twins.varied.points is not None else left_out(base, varied)
    if twins.varied.poison is not None:
        found += stray_findings(varied, laboratory.graph, check=check, condition=twins.varied.name)
        missing += unwatched(varied)
    if twins.ranks:
        told = {"check": check, "condition": twins.varied.name}
        found += replica_findings(varied, laboratory.graph, pairs=twins.pairs, **told)
        shards, untold = _compare_weights(laboratory, twins, check=check)
        return [*found, *shards], [*missing, *untold]
    return found, missing


def _compare_weights(laboratory: Laboratory, twins: Twins, *, check: str) -> tuple[list[Finding], list[Unmatched]]:
    """What is wrong with the varied run's weights; that they were not looked at, with the reason."""
    if laboratory.brief:
        return [], []  # weights are the same whatever is run
    condition = twins.varied.name
    try:
        base, varied = laboratory.weights(twins.base), laboratory.weights(twins.varied)
    except UsageError as error:
        return [], [Unmatched(side="candidate", point=PARAMETERS, reason=str(error))]
    ranks = math.prod(laboratory.view(twins.varied).capture.manifest.side.parallel.values())
    return weight_findings(base, varied, ranks=ranks, check=check, condition=condition), []


def _allowed(dtypes: tuple[str, str], depth: int, *, exact: bool, terms: int) -> Tolerance:
    return EXACT if exact else reordering(dtypes, depth=depth, terms=terms)


def _broken(name: str, twins: Twins, error: EngineError) -> Finding:
    return Finding(
        check=name,
        case=twins.pairs[0][0],
        point=f"#{name}",
        verdict="error",
        message=f"{twins.varied.name}: {error}",
        condition=twins.varied.name,
    )


def _keep(kept: dict[tuple[str, str], Finding], new: Finding) -> None:
    """Keep the worse of two findings of one point and case; a failure names all conditions that fail."""
    key = (new.case, new.point)
    old = kept.get(key)
    if old is None:
        kept[key] = new
        return
    worse, other = (new, old) if badness(new) > badness(old) else (old, new)
    if other.verdict == worse.verdict == "fail" and other.message != worse.message:
        worse = msgspec.structs.replace(worse, message=f"{worse.message}; also {other.message}".strip("; "))
    kept[key] = worse


def badness(finding: Finding) -> tuple[int, float]:
    """For comparing findings: the verdict first, then how much of what is allowed is used."""
    allowed = finding.allowed or 0.0
    value = finding.value or 0.0
    return SEVERITY.index(finding.verdict), value / allowed if allowed else (math.inf if value else 0.0)
