"""Measuring one point of one case: shared by the checks that compare tensors."""

from __future__ import annotations

import math

from paritykit.captures.manifest import CACHE_PORTS, split_key
from paritykit.checks.base import Subject
from paritykit.checks.floors import FloorMeter, judge_point, name_reference
from paritykit.checks.routing import soften
from paritykit.comparison.align import pairs
from paritykit.comparison.judge import finding_from
from paritykit.comparison.metrics import Meter
from paritykit.mapping.rules import Rule
from paritykit.results import Finding


def measure_point(subject: Subject, rule: Rule, case: str, *, check: str, depth: int | None = None) -> Finding:
    """The finding for one rule and case.

    ``depth`` is how many points were computed since the input was right, the point's place in execution order if None.
    Verdict ``error`` where the candidate lacks rows that the reference has, ``skip`` where the reference has none.
    """
    reference, candidate = subject.reference, subject.candidate
    ours, theirs = reference.point(rule.reference), candidate.point(rule.candidate)
    dtypes = (ours.dtype, theirs.dtype)
    order = subject.graph.order(rule.reference)
    policy = subject.policy(rule.reference, dtypes, check=check)
    allowed = subject.allowed(dtypes, order=order if depth is None else depth, policy=policy)
    twin = subject.twin if depth is None and subject.floor_judges(dtypes, policy) else None
    meter, places = Meter(element_tolerance=allowed.whole), list[int]()
    floor = FloorMeter(twin, point=rule.reference, case=case)
    for position, left, right in pairs(rule, reference, candidate, case):
        meter.update(left, right)
        floor.update(position, left, right)
        places += range(position, position + left.shape[0])
    wanted = wanted_rows(subject, rule, case, found=places)
    if len(places) != wanted or not wanted:
        return Finding(
            check=check,
            case=case,
            point=rule.reference,
            verdict="error" if wanted else "skip",
            order=order,
            candidate_point=rule.candidate,
            mapping=rule.describe(),
            message=f"the candidate computed {len(places)} of {wanted} positions"
            if wanted
            else "the reference did not run it in this case",
        )
    measured, noise = meter.result(), floor.result()
    finding = finding_from(
        measured,
        allowed if noise is None else judge_point(subject, rule, measured, noise, policy=policy),
        noise=noise,
        check=check,
        case=case,
        point=rule.reference,
        order=order,
        places=places,
        shape=[wanted, math.prod(ours.row)],
        dtypes=dtypes,
        candidate_point=rule.candidate,
        mapping=rule.describe(),
    )
    return soften(subject, finding if noise is None else name_reference(subject, rule, finding, noise))


def wanted_rows(subject: Subject, rule: Rule, case: str, *, found: list[int]) -> int:
    """How many positions the candidate must show: all that the reference has.

    Of a cache behind a sliding window those in the window are enough: what lies before may be overwritten.
    """
    spans = subject.reference.spans(subject.reference.point(rule.reference), case)
    wanted = sum(s.length for s in spans)
    module, port, _ = split_key(rule.candidate)
    window = int(subject.candidate.manifest.facts.get("windows", {}).get(module, 0))
    if port in CACHE_PORTS and window:
        end = max((s.position + s.length for s in spans), default=0)
        if found == list(range(max(0, end - window), end)):
            return len(found)
    return wanted
