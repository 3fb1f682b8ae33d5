"""Where no cause of the table fits: which edit of the reference's own code gives the candidate's numbers.

Asked of the reference's process for the module to blame, and where none of its edits fits for those around it, up to
its layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from paritykit.captures.manifest import split_key
from paritykit.diagnose.catalogue import UNKNOWN, find_cause
from paritykit.diagnose.edits.ask import Ask, EditFound, Looked, Question
from paritykit.diagnose.limits import allowed_of, pooled_floor
from paritykit.diagnose.scene import Scene
from paritykit.results import Cause, Finding

STEP = find_cause("step-changed")
SHOWN = 3


def edited_causes(scene: Scene, by_point: Mapping[str, list[Finding]], unknown: Cause, ask: Ask) -> list[Cause]:
    """The edit that explains it, or ``unknown`` with those that come nearest."""
    looks = list(_looks(scene, by_point))
    if not looks:
        return [unknown]
    question = Question(
        reference=str(scene.reference_capture.path),
        candidate=str(scene.candidate_capture.path),
        rules=list(scene.rules.values()),
        looks=looks,
        cases=scene.cases,
    )
    found = ask(question)
    fitting = next((f for f in found if f.fits), None)
    if fitting is not None:
        return [_cause(fitting)]
    if not found:
        return [unknown]
    near = "; ".join(f"{_said(f)} leaves {f.left:.0%}" for f in found[:SHOWN])
    text = f"{unknown.evidence}; of {found[0].tried} edits of the reference's {found[0].module}: {near}"
    return [Cause(code=UNKNOWN.code, name=UNKNOWN.name, confidence=0.0, evidence=text)]


def _looks(scene: Scene, by_point: Mapping[str, list[Finding]]) -> Iterator[Looked]:
    """The outputs of the module to blame and of those around it, up to the layer, as far as both sides show them."""
    path = split_key(scene.located)[0]
    while path:
        findings = by_point.get(path, [])
        measured = [f for f in findings if f.metrics]
        if path in scene.rules and any(f.verdict == "fail" for f in measured):
            floor = pooled_floor(measured)
            yield Looked(point=path, allowed=allowed_of(measured, floor), floor=floor)
        if path == scene.layer:
            return
        path = path.rpartition(".")[0]


def _said(found: EditFound) -> str:
    at = f" at {found.where}" if found.where else ""
    return f"{found.label}{at}{f' `{found.code}`' if found.code else ''}"


def _cause(found: EditFound) -> Cause:
    text = f"with {_said(found)} the reference's {found.module} gives the candidate's numbers: {found.left:.1e} of the"
    text += f" difference is left on positions it was not chosen by (next of {found.tried} edits: {found.rival:.1e})"
    return Cause(code=STEP.code, name=STEP.name, confidence=found.confidence, evidence=text)
