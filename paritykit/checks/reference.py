"""Check ``reference``: does the reference agree with itself, with its other attention and in a padded batch?

What differs here by more than the noise floor is the reference's own doing, and no candidate can be blamed by it.
"""

from __future__ import annotations

import msgspec

from paritykit.captures.manifest import leading_points
from paritykit.captures.reader import Capture
from paritykit.checks.base import Answer, ReferenceCheck, ReferenceSubject, Subject
from paritykit.checks.measured import measure_point
from paritykit.diagnose.locate import locate
from paritykit.errors import EngineError
from paritykit.mapping.build import Mapping
from paritykit.mapping.rules import Rule
from paritykit.results import Coverage, Finding, Unmatched

NAME = "reference"


def run(subject: ReferenceSubject) -> Answer:
    """One finding for each point and case, its worst over all ways to run the reference."""
    if subject.twin is None:
        skipped = [Unmatched(side="reference", point=NAME, reason=f"no noise floor: {subject.no_floor}")]
        return Answer(coverage=Coverage(check=NAME, points=0, compared=0, skipped=skipped), findings=[])
    kept: dict[tuple[str, str], Finding] = {}
    skipped = []
    for condition, capture in subject.variants():
        if isinstance(capture, EngineError):
            skipped.append(Unmatched(side="reference", point=condition, reason=str(capture).splitlines()[0]))
            continue
        for finding in compare(subject.truth, subject.twin, capture, condition=condition):
            key = (finding.case, finding.point)
            if key not in kept or kept[key].verdict == "pass":
                kept[key] = finding
    points = {point for _, point in kept}
    coverage = Coverage(check=NAME, points=len(points) + len(skipped), compared=len(points), skipped=skipped)
    return Answer(coverage=coverage, findings=sorted(kept.values(), key=lambda f: (f.case, f.order)))


def compare(truth: Capture, twin: Capture, varied: Capture, *, condition: str) -> list[Finding]:
    """What one other way to run the reference gives, against its truth, beside its twin."""
    shared = [k for k in leading_points(truth.manifest.points) if k in varied.points]
    mapping = Mapping(rules=[Rule(reference=k, candidate=k) for k in shared], misfits=[], skipped=[], unmatched=[])
    subject = Subject(reference=truth, candidate=varied, mapping=mapping, twin=twin)
    found: list[Finding] = []
    for case in truth.cases:
        found += locate([measure_point(subject, r, case, check=NAME) for r in mapping.rules], subject.graph)
    return [msgspec.structs.replace(f, condition=condition, message=_message(f, condition)) for f in found]


def _message(finding: Finding, condition: str) -> str:
    if finding.verdict != "fail":
        return finding.message
    return f"the reference itself gives something else with {condition}; what it says here proves nothing"


CHECK = ReferenceCheck(
    name=NAME,
    question="does the reference agree with itself, whatever its attention and its batches?",
    run=run,
    detects=("softcap-left-out",),
)
