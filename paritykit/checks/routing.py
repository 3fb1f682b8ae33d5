"""Tokens that a mixture of experts sends elsewhere for no other reason than rounding.

Where two experts are nearly tied, an error within the noise floor chooses between them, and all that follows differs
with it. Such a *flip* is legitimate where the reference's own margin between the experts is within twice the error that
was measured in the router's logits there, and that error is itself within the floor.
"""

from __future__ import annotations

import msgspec
import torch

from paritykit.checks.base import Subject
from paritykit.checks.floors import sound_positions
from paritykit.comparison.align import pairs
from paritykit.mapping.rules import Rule
from paritykit.results import Finding

UNKNOWN = "behind expert routing in half precision, where near-ties may flip; --dtype float32 checks the structure"


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """A token that the candidate's router sends to other experts than the reference's."""

    point: str
    order: int
    position: int
    experts: tuple[tuple[int, ...], tuple[int, ...]]
    margin: float
    error: float

    def describe(self) -> str:
        """The flip in words."""
        ours, theirs = (", ".join(map(str, e)) for e in self.experts)
        return (
            f"behind a flip of {self.point} at position {self.position}: experts {theirs} instead of {ours}, "
            f"by a margin of {self.margin:.2g} where the router is off by {self.error:.2g}"
        )


def soften(subject: Subject, finding: Finding) -> Finding:
    """``finding``, *inconclusive* where it fails behind a legitimate flip, at positions that the flip reaches only.

    Where it is not known how many experts a token goes to, every failure behind a router in half precision is.
    """
    behind = subject.routed_from is not None and finding.order > subject.routed_from
    if finding.verdict != "fail" or not behind or finding.metric == "nonfinite_mismatch":
        return finding
    if subject.experts_per_token is None:
        return _unsure(finding, UNKNOWN) if subject.half_precision else finding
    reaching = [f for f in legitimate_flips(subject, finding.case) if f.order < finding.order]
    first = min(reaching, key=lambda f: f.position, default=None)
    if first is None or any(start < first.position for start, _ in finding.failing):
        return finding
    return _unsure(finding, first.describe())


def legitimate_flips(subject: Subject, case: str) -> list[Flip]:
    """Every legitimate flip of a case, by router in order of execution and then by position."""
    if case not in subject.flips:
        shown = subject.candidate.points
        rules = [r for r in subject.mapping.rules if r.reference in subject.routers and r.candidate in shown]
        rules.sort(key=lambda r: subject.graph.order(r.reference))
        subject.flips[case] = [flip for rule in rules for flip in _of_router(subject, rule, case)]
    return subject.flips[case]


def _of_router(subject: Subject, rule: Rule, case: str) -> list[Flip]:
    found = list[Flip]()
    sound: dict[int, bool] | None = None
    for start, left, right in pairs(rule, subject.reference, subject.candidate, case):
        for row, (mine, other) in enumerate(zip(left.double(), right.double(), strict=True)):
            flip = _flip(mine, other, count=subject.experts_per_token or 1)
            if flip is None or flip[1] > 2 * flip[2]:
                continue
            if sound is None:
                sound = sound_positions(subject, rule, case)
            if sound[start + row]:
                order = subject.graph.order(rule.reference)
                experts, margin, error = flip
                found.append(
                    Flip(
                        point=rule.reference,
                        order=order,
                        position=start + row,
                        experts=experts,
                        margin=margin,
                        error=error,
                    )
                )
    return found


def _flip(
    mine: torch.Tensor, other: torch.Tensor, *, count: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], float, float] | None:
    """Both sides' experts, the reference's margin between those exchanged, and the largest error of a router logit."""
    ours, theirs = (set(x.topk(min(count, len(x))).indices.tolist()) for x in (mine, other))
    if ours == theirs:
        return None
    margin = max(float(mine[e]) for e in ours - theirs) - min(float(mine[e]) for e in theirs - ours)
    return (tuple(sorted(ours)), tuple(sorted(theirs))), margin, float((mine - other).abs().max())


def _unsure(finding: Finding, text: str) -> Finding:
    return msgspec.structs.replace(finding, verdict="inconclusive", message=finding.message or text)
