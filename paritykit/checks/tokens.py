"""Check ``tokens``: does greedy decoding choose the same tokens, fed the reference's and left alone?

A different choice is a *near-tie*, and no failure, where the reference's own margin between the two tokens is within
twice the logit error measured at that position, and that error is itself within tolerance.
"""

from __future__ import annotations

import msgspec

from paritykit.checks.base import LOGITS, Check, Subject
from paritykit.checks.floors import sound_positions
from paritykit.checks.logits import logits_pair, logits_rule
from paritykit.checks.routing import soften
from paritykit.results import Coverage, Finding, Unmatched, Verdict

FORCED = "#tokens"
FREE = "#tokens:free"


class Choice(msgspec.Struct, frozen=True):
    """A token both sides chose at one step: ids, the reference's margin between them, and the logit error there."""

    step: int
    reference: int
    candidate: int
    margin: float
    error: float
    sound: bool

    @property
    def near_tie(self) -> bool:
        """Whether the measured error explains the difference."""
        return self.sound and self.margin <= 2 * self.error

    def describe(self) -> str:
        """The choice in words."""
        kind = "near-tie" if self.near_tie else "flip"
        return (
            f"new token {self.step}: {self.reference} in the reference, {self.candidate} in the candidate; {kind}: "
            f"margin {self.margin:.3g}, logit error {self.error:.3g}"
        )


def run(subject: Subject, case: str) -> list[Finding]:
    """Two findings: teacher-forced, and free-running where the candidate was run so."""
    rule = logits_rule(subject)
    new = subject.reference.cases[case].new_tokens
    if rule is None or not new:
        return []
    ours = subject.reference.generated(case)
    forced = _judged(subject, case, FORCED, ours, subject.candidate.generated(case), stop=False)
    free = subject.free_tokens
    return [forced] + ([_judged(subject, case, FREE, ours, free.get(case, []), stop=True)] if free is not None else [])


def _judged(subject: Subject, case: str, point: str, ours: list[int], theirs: list[int], *, stop: bool) -> Finding:
    """Judge every differing choice; ``stop`` after the first, since what follows continues another text."""
    if len(ours) != len(theirs):
        return _finding(
            subject,
            case,
            point,
            "error",
            message=f"{len(theirs)} new tokens instead of {len(ours)}",
            flips=0,
            total=len(ours),
        )
    steps = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    choices = [_choice(subject, case, n, ours[n], theirs[n]) for n in (steps[:1] if stop else steps)]
    flips = [c for c in choices if not c.near_tie]
    text = "; ".join(c.describe() for c in (flips or choices)[:3])
    return _finding(subject, case, point, "fail" if flips else "pass", message=text, flips=len(flips), total=len(ours))


def _choice(subject: Subject, case: str, step: int, ours: int, theirs: int) -> Choice:
    rule = logits_rule(subject)
    assert rule is not None
    places, left, right = logits_pair(subject, rule, case)
    row = places.index(len(subject.reference.cases[case].tokens) - 1 + step)
    mine, other = left[row].double(), right[row].double()
    sound = sound_positions(subject, rule, case, check="tokens")[places[row]]
    return Choice(step, ours, theirs, float(mine[ours] - mine[theirs]), float((mine - other).abs().max()), sound)


def _finding(
    subject: Subject, case: str, point: str, verdict: Verdict, *, message: str, flips: int, total: int
) -> Finding:
    finding = Finding(
        check="tokens",
        case=case,
        point=point,
        verdict=verdict,
        metric="flips",
        value=float(flips),
        allowed=0.0,
        allowed_source="flips beyond the measured logit error",
        order=subject.graph.order(LOGITS) + (2 if point == FREE else 1),
        message=message,
        metrics={"new_tokens": float(total)},
        mapping="greedy choices, token by token",
    )
    return soften(subject, finding)


def cover(subject: Subject) -> Coverage:
    """Teacher-forced and free-running choices, where there are new tokens and logits on both sides."""
    possible = logits_rule(subject) is not None and any(c.new_tokens for c in subject.reference.cases.values())
    compared = (2 if subject.free_tokens is not None else 1) if possible else 0
    missing = [] if possible else [Unmatched(side="candidate", point=FORCED)]
    return Coverage(check="tokens", points=max(compared, 1), compared=compared, unmatched=missing)


CHECK = Check(
    name="tokens",
    question="does greedy decoding choose the same tokens, fed the reference's and left alone?",
    run=run,
    cover=cover,
    detects=("lm-head", "position-shift"),
)
