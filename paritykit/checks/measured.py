"""Measuring one point of one case: shared by the checks that compare tensors."""

from __future__ import annotations

import math

import msgspec
import torch

from paritykit.captures.manifest import CACHE_PORTS, split_key
from paritykit.checks.base import Subject
from paritykit.checks.floors import FloorMeter, drawn_at, judge_point, name_reference
from paritykit.checks.routing import find_flips
from paritykit.comparison.align import pairs, shared_places
from paritykit.comparison.cutting import CutMeter, put_back
from paritykit.comparison.floor import Judged
from paritykit.comparison.judge import finding_from, judge
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.metrics import Meter
from paritykit.comparison.noise import Noise
from paritykit.comparison.routing import judge_around
from paritykit.comparison.tolerance import Tolerance, coarser, is_half
from paritykit.mapping.rules import Rule
from paritykit.results import Finding


def measure_point(subject: Subject, rule: Rule, case: str, *, check: str, depth: int | None = None) -> Finding:
    """The finding for one rule and case.

    ``depth`` is how many points were computed since the input was right, the point's place in execution order if None.
    Such a local error is held against the noise floor, and against the table's number for so many points too: a floor
    that grew over all points before is no measure of a few.
    Verdict ``error`` where the candidate lacks rows that the reference has, ``skip`` where the reference has none.
    """
    places = shared_places(rule, subject.reference, subject.candidate, case)
    wanted, order = wanted_rows(subject, rule, case, found=places), subject.graph.order(rule.reference)
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
    return judge_around(
        find_flips(subject, case),
        places,
        order=order,
        half=subject.half_precision,
        judged=lambda some: _measured(subject, rule, case, some, check=check, depth=depth),
        after=-1 if depth is None else order - depth,
    )


def _measured(subject: Subject, rule: Rule, case: str, places: list[int], *, check: str, depth: int | None) -> Finding:
    """The finding of these positions, which both sides have."""
    order, dtypes = subject.graph.order(rule.reference), subject.dtypes(rule)
    policy = subject.policy(rule.reference, dtypes, check=check)
    allowed = subject.allowed(dtypes, order=order if depth is None else depth, policy=policy)
    twin = subject.twin if subject.floor_judges(dtypes, policy) else None
    draws = drawn_at(subject, rule, case, places)

    def look(lost: float = 0.0) -> tuple[Measurement, Noise | None, Tolerance | Judged]:
        meter = Meter(element_tolerance=allowed.whole)
        floor = FloorMeter(twin, point=rule.reference, case=case)
        for position, left, right in pairs(rule, subject.reference, subject.candidate, case, only=places):
            whole = put_back(right, lost, getattr(torch, dtypes[1])).to(left.dtype) if lost else right
            meter.update(left, whole)
            floor.update(position, left, whole)
        measured, noise = meter.result(), floor.result()
        if noise is None:
            return measured, noise, allowed
        return measured, noise, judge_point(subject, rule, measured, noise, draws=draws, policy=policy)

    measured, noise, ruled = look()
    undrawn = draws is not None and not draws.differ and is_half(dtypes[1])
    if undrawn and isinstance(ruled, Judged) and ruled.verdict == "fail":
        lost = _cut(subject, rule, case, places, dtype=dtypes[1])
        whole, around, again = look(lost)
        if isinstance(again, Judged) and again.verdict == "pass":
            source = f"{again.source}; {lost:.1g} of a unit in the last place put back, as a kernel cut it"
            measured, noise, ruled = whole, around, msgspec.structs.replace(again, source=source)
    drawn = subject.local and draws is not None
    if depth is not None and not drawn and isinstance(ruled, Judged) and ruled.verdict == "pass":
        table = msgspec.structs.replace(allowed, source=f"fallback table, {coarser(dtypes)}, {depth} points on")
        ruled, noise = (table, None) if judge(measured, table)[0] == "fail" else (ruled, noise)
    finding = finding_from(
        measured,
        ruled,
        noise=noise,
        check=check,
        case=case,
        point=rule.reference,
        order=order,
        places=places,
        shape=[len(places), math.prod(subject.reference.point(rule.reference).row)],
        dtypes=dtypes,
        candidate_point=rule.candidate,
        mapping=rule.describe(),
    )
    return finding if noise is None else name_reference(subject, rule, finding, noise)


def _cut(subject: Subject, rule: Rule, case: str, places: list[int], *, dtype: str) -> float:
    """Units in the last place that the candidate lost here by cutting."""
    meter = CutMeter(getattr(torch, dtype))
    for _, left, right in pairs(rule, subject.reference, subject.candidate, case, only=places):
        meter.update(left, right)
    return meter.result()


def wanted_rows(subject: Subject, rule: Rule, case: str, *, found: list[int]) -> int:
    """How many positions the candidate must show: all that the reference has.

    Of a cache behind a sliding window those in the window are enough, and of one that is cut into chunks those of the
    last chunk: what lies before may be overwritten.
    """
    spans = subject.reference.spans(subject.reference.point(rule.reference), case)
    wanted = sum(s.length for s in spans)
    module, port, _ = split_key(rule.candidate)
    facts = subject.candidate.manifest.facts
    window, chunk = (int(facts.get(name, {}).get(module, 0)) for name in ("windows", "chunks"))
    if port in CACHE_PORTS and (window or chunk):
        end = max((s.position + s.length for s in spans), default=0)
        start = max(0, (end - 1) // chunk * chunk if chunk else end - window)
        if found == list(range(start, end)):
            return len(found)
    return wanted
