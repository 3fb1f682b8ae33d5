"""The noise floor of a subject's points: truth, twin and candidate brought together, case by case."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec
import torch

from paritykit.captures.reader import Capture
from paritykit.checks.base import Subject
from paritykit.comparison.align import own_rows, pairs
from paritykit.comparison.ensemble import PointDraws
from paritykit.comparison.floor import DRAWN_FACTOR, DRAWN_FACTORS, FACTOR, Judged, beyond_floor, chance, judge_floor
from paritykit.comparison.guard import DEGREES
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.metrics import Meter
from paritykit.comparison.noise import Noise
from paritykit.comparison.policy import Policy
from paritykit.comparison.spread import SpreadMeter
from paritykit.comparison.twin import twin_cases, twin_error
from paritykit.mapping.rules import Rule
from paritykit.results import Finding

LAYER = re.compile(r"(?<=\.)\d+(?=[.#]|$)")
BROKEN = 0.5
"""Where the twin is off by half of what it should be, twice that says nothing of a candidate."""
FEW = 500.0
"""A twin of fewer independent numbers may be lucky, and is held together with its neighbours where it matters."""


class FloorMeter:
    """Measures a point's noise beside its metrics, as long as the twin has the rows that it is fed."""

    def __init__(self, twin: Capture | None, *, point: str, case: str) -> None:
        self._twin, self._point, self._case = twin, point, case
        self._meters = {} if twin is None else {name: SpreadMeter() for name in twin_cases(twin, case)}

    def update(self, position: int, truth: torch.Tensor, candidate: torch.Tensor) -> None:
        """Rows from ``position`` on, ``[tokens, features]`` each."""
        assert self._twin is not None or not self._meters
        for name, meter in list(self._meters.items()):
            rows = None if self._twin is None else own_rows(self._twin, self._point, name, position, len(truth))
            if rows is None or rows.shape != truth.shape:
                del self._meters[name]
            else:
                meter.update(truth, rows, candidate)

    def result(self) -> Noise | None:
        """The noise, by the way of the twin that has most; None where it lacks this point or some of its rows."""
        if self._case not in self._meters:
            return None
        return max((m.result() for m in self._meters.values()), key=lambda noise: noise.twin.whole)


def drawn_at(subject: Subject, rule: Rule, case: str, places: Sequence[int]) -> PointDraws | None:
    """What the draws of the ensemble do at these positions; None where it has them not."""
    found = None if subject.ensemble is None else subject.ensemble.at(rule.reference, case)
    if found is None or not places or places[-1] >= len(found.truth):
        return None
    return found if len(places) == len(found.truth) else found.select(list(places))


def judge_point(
    subject: Subject,
    rule: Rule,
    measured: Measurement,
    noise: Noise,
    *,
    draws: PointDraws | None = None,
    policy: Policy | None = None,
) -> Judged:
    """The floor's verdict on a point; a lone twin's luck with few numbers is evened out by its neighbours."""
    dtype = subject.candidate.point(rule.candidate).dtype
    usual = FACTOR if draws is None else DRAWN_FACTORS.get(dtype, DRAWN_FACTOR)
    factor = usual if policy is None or policy.factor is None else policy.factor
    note = "" if policy is None else policy.note
    if draws is not None:
        return judge_floor(
            measured, noise, dtype=dtype, factor=factor, note=note, draws=draws, luck=subject.luck(rule.reference)
        )
    judged = judge_floor(measured, noise, dtype=dtype, factor=factor, note=note)
    many = noise.even_rows * noise.even_channels >= FEW and noise.twin.whole
    if judged.verdict == "pass" or judged.metric == "nonfinite_mismatch" or many:
        return judged
    pooled = pooled_floor(subject, rule.reference)
    if pooled <= noise.twin.whole:
        return judged
    return judge_floor(measured, noise, dtype=dtype, factor=factor, pooled=pooled, note=note)


def name_reference(subject: Subject, rule: Rule, finding: Finding, noise: Noise) -> Finding:
    """``finding``, *inconclusive* where the reference's own twin is as far from the truth: no candidate is to blame."""
    text = ""
    if noise.twin.whole >= BROKEN:
        text = f"the reference itself is off by {noise.twin.whole:.2g} of its size in the candidate's dtype"
    elif finding.metric == "nonfinite_mismatch" and not _blamed_nonfinite(subject, rule, finding.case):
        text = "the reference itself has the same NaN or Inf in the candidate's dtype"
    if not text:
        return finding
    return msgspec.structs.replace(finding, verdict="inconclusive", message=f"{text}; check `reference` looks closer")


def _blamed_nonfinite(subject: Subject, rule: Rule, case: str) -> bool:
    """Whether the candidate has a NaN or Inf where both truth and twin have none, or lacks one that they have."""
    for position, left, right in pairs(rule, subject.reference, subject.candidate, case):
        twin = own_rows(subject.twin, rule.reference, case, position, len(left)) if subject.twin is not None else None
        if twin is None:
            return True
        differs = (left.isfinite() != right.isfinite()) & (right.isfinite() != twin.isfinite())
        if bool(differs.any()):
            return True
    return False


def pooled_floor(subject: Subject, key: str) -> float:
    """The twin's error at a point over all cases, or at the same point of the layers before and after it.

    Of these two the smaller: a floor that only grows with depth lends nothing.
    """
    found = LAYER.search(key)
    around = [] if found is None else [LAYER.sub(str(int(found[0]) + n), key, count=1) for n in (-1, 1)]
    neighbours = [_over_cases(subject, k) for k in around if k in subject.reference.points]
    return max(_over_cases(subject, key), min(neighbours) if len(neighbours) == 2 else 0.0)


def sound_positions(
    subject: Subject, rule: Rule, case: str, *, check: str = "modules", alone: bool = True
) -> dict[int, bool]:
    """For each position whether the candidate's error there is no more than it may be of a single one.

    Not ``alone``: than it may be of all together, which leaves less to chance.
    """
    dtypes = subject.dtypes(rule)
    policy = subject.policy(rule.reference, dtypes, check=check)
    meter, places = Meter(), list[int]()
    floor = FloorMeter(subject.twin if subject.floor_judges(dtypes, policy) else None, point=rule.reference, case=case)
    for position, left, right in pairs(rule, subject.reference, subject.candidate, case):
        meter.update(left, right)
        floor.update(position, left, right)
        places += range(position, position + len(left))
    noise = floor.result()
    if noise is None:
        allowed = subject.allowed(dtypes, order=subject.graph.order(rule.reference), policy=policy)
        limit = allowed.position if alone else allowed.whole
        far = [not error <= limit for error in meter.result().row_rel_l2]
    else:
        factor = FACTOR if policy is None or policy.factor is None else policy.factor
        luck = chance(min(noise.features, DEGREES)) if alone else 1.0
        draws = drawn_at(subject, rule, case, places)
        far = beyond_floor(noise, dtype=dtypes[1], factor=factor * luck, draws=draws)
    return {place: not beyond for place, beyond in zip(places, far, strict=True)}


def _over_cases(subject: Subject, key: str) -> float:
    """The root mean square over cases of the twin's relative error."""
    if subject.twin is None or key in subject.twin_errors:
        return subject.twin_errors.get(key, 0.0)
    found = [twin_error(subject.reference, subject.twin, key, case) for case in subject.reference.cases]
    errors = [e for e in found if e is not None and math.isfinite(e)]
    subject.twin_errors[key] = math.sqrt(sum(e * e for e in errors) / len(errors)) if errors else 0.0
    return subject.twin_errors[key]
