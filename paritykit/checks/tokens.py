"""Check ``tokens``: does greedy decoding choose the same tokens, fed the reference's and left alone?

What a near-tie is, and why it is no failure: ``paritykit.comparison.choices``.
"""

from __future__ import annotations

from paritykit.checks.base import LOGITS, Check, Subject
from paritykit.checks.floors import sound_positions
from paritykit.checks.logits import logits_pair, logits_rule
from paritykit.checks.routing import find_flips
from paritykit.comparison.choices import Choice, choice_at, choice_finding, compare_choices
from paritykit.results import Coverage, Finding, Unmatched

FORCED = "#tokens"
FREE = "#tokens:free"
SIDES = ("the reference", "the candidate")


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
    rule = logits_rule(subject)
    assert rule is not None

    def weigh(step: int) -> Choice:
        places, left, right = logits_pair(subject, rule, case)
        row = places.index(len(subject.reference.cases[case].tokens) - 1 + step)
        sound = sound_positions(subject, rule, case, check="tokens")[places[row]]
        return choice_at(step, (ours[step], theirs[step]), (left[row], right[row]), sound=sound)

    even = len(ours) == len(theirs)
    flips, text = compare_choices(ours if even else [], theirs, weigh, sides=SIDES, stop=stop)
    prompt, order = len(subject.reference.cases[case].tokens), subject.graph.order(LOGITS)
    places = [prompt - 1 + choice.step for choice in flips]
    return choice_finding(
        check="tokens",
        case=case,
        point=point,
        order=order + (2 if point == FREE else 1),
        flips=len(flips),
        total=len(ours),
        message=text if even else f"{len(theirs)} new tokens instead of {len(ours)}",
        error=not even,
        excuse=find_flips(subject, case).excuse(places, order=order, half=subject.half_precision) if flips else "",
    )


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
