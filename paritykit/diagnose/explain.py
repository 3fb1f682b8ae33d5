"""Why it differs: the causes of the first points that fail, each a hypothesis that was tested.

For each of these points the hypotheses of every cause are held against the candidate's rows (``trial`` says how they
are scored). What fits is named, at most three causes; where nothing does, cause ``unknown`` shows the evidence.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from paritykit.captures.manifest import split_key
from paritykit.captures.reader import Capture
from paritykit.diagnose.catalogue import UNKNOWN, CauseKind
from paritykit.diagnose.edited import edited_causes
from paritykit.diagnose.edits.ask import Ask
from paritykit.diagnose.evidence import describe
from paritykit.diagnose.known import weights_of
from paritykit.diagnose.limits import allowed_of, pooled_floor
from paritykit.diagnose.locate import UNMEASURED
from paritykit.diagnose.scene import ReadTensor, Scene
from paritykit.diagnose.screening import ODD, Named, screen
from paritykit.diagnose.slices import find_slices
from paritykit.diagnose.trial import Bar, Pattern
from paritykit.mapping.rules import Rule
from paritykit.results import Cause, Finding, Slice

log = logging.getLogger(__name__)
SHOWN = 3
LEAST = 0.01
"""Confidence below which a cause is not shown beside another: it reads as none."""
COMPARING = ("modules", "logits", "tokens")
"""Checks whose findings are explained by what was captured."""
EXPLAINED_POINTS = 3
"""Points that are explained: the first, and modules beside it that differ too, though what they were fed is right."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Two captures, the rules between them by the reference's point, and the reference's checkpoint.

    ``ask`` has the reference's process search for edits of its code.
    """

    reference: Capture
    candidate: Capture
    rules: Mapping[str, Rule]
    config: Mapping[str, Any] | None = None
    read: ReadTensor | None = None
    ask: Ask | None = None

    def scene(self, point: str, findings: list[Finding]) -> Scene:
        """The scene of a point, from its findings in all cases: those that fail come first, the short ones before."""
        failing = [f for f in findings if f.verdict == "fail"]
        cases = self.reference.cases
        first = sorted((f.case for f in failing), key=lambda c: cases[c].positions)
        floor = pooled_floor(findings)
        return Scene(
            reference=self.reference,
            candidate=self.candidate,
            rules=self.rules,
            point=point,
            located=failing[0].located,
            cases=dict.fromkeys([*first, *cases]),
            allowed=allowed_of(findings, floor),
            floor=floor,
            config=self.config,
            read=self.read,
        )

    def slices(self, finding: Finding) -> list[Slice]:
        """Which part of its point is wrong: what a replay saw of it comes first."""
        if finding.local is not None and finding.local.culprit:
            return finding.slices
        rule = self.rules.get(finding.point)
        if rule is None or finding.point not in self.reference.points or rule.candidate not in self.candidate.points:
            return []
        try:
            return find_slices(finding, rule, reference=self.reference, candidate=self.candidate)
        except ODD as error:
            log.debug("the wrong part of %s cannot be told: %s: %s", finding.point, type(error).__name__, error)
            return []


def explain(
    findings: Iterable[Finding],
    *,
    reference: Capture,
    candidate: Capture,
    rules: Iterable[Rule],
    config: Mapping[str, Any] | None = None,
    read: ReadTensor | None = None,
    ask: Ask | None = None,
) -> list[Finding]:
    """``findings`` with causes at the first points that differ; the others as they are.

    ``rules`` are the mapping between both captures, ``config`` and ``read`` the reference's checkpoint. With ``ask``
    the reference's code is edited where no other cause fits.
    """
    known = list(findings)
    table = {r.reference: r for r in rules}
    sides = Sides(reference=reference, candidate=candidate, rules=table, config=config, read=read, ask=ask)
    by_point: dict[str, list[Finding]] = defaultdict(list)
    for finding in known:
        if finding.check in COMPARING:
            by_point[finding.point].append(finding)
    made = {p: _explained(p, by_point, known, sides) for p in _first_points(known)}
    return [
        msgspec.structs.replace(f, causes=made[f.point], slices=sides.slices(f))
        if f.verdict == "fail" and f.check in COMPARING and f.point in made
        else f
        for f in known
    ]


def _explained(point: str, by_point: Mapping[str, list[Finding]], known: list[Finding], sides: Sides) -> list[Cause]:
    """The causes of one point. What check ``weights`` says of its module comes first: it looked at the weights."""
    findings = by_point[point]
    if point not in sides.rules or point not in sides.reference.points:
        return [_not_computed(findings[0], f"there is no computation to test at {point}")]
    parameters: dict[str, str] = sides.reference.manifest.facts.get("parameters", {})
    told = weights_of(known, split_key(point)[0], parameters)
    try:
        scene = sides.scene(point, findings)
        said = causes_of(scene) if scene.cases else []
        if sides.ask is not None and not told and [c.name for c in said] == [UNKNOWN.name]:
            said = edited_causes(scene, by_point, said[0], sides.ask)
    except ODD as error:
        log.debug("%s cannot be explained: %s: %s", point, type(error).__name__, error)
        said = [_not_computed(findings[0], f"{point} cannot be looked at: {error}")]
    sure = {c.name: c for c in reversed(told)}
    others = [c for c in said if c.name not in sure and not (told and c.name == UNKNOWN.name)]
    return [*sure.values(), *others][:SHOWN]


def _not_computed(finding: Finding, why: str) -> Cause:
    """The cause of what is no tensor: a token chosen from equal logits, a point of another size."""
    text = f"{why}: {finding.message}" if finding.message else why
    return Cause(code=UNKNOWN.code, name=UNKNOWN.name, confidence=0.0, evidence=text)


def causes_of(scene: Scene) -> list[Cause]:
    """The causes that fit, best first, at most three, and beside it only those that may be it as well.

    ``unknown`` with what can be seen where none fits.
    """
    with torch.inference_mode():
        bar = Bar(scene)
        if not bar.wrong.any() and not scene.floor:
            return []
        found = screen(scene, bar)
        named, patterns = found.named, found.patterns
        fitting = [n for n in named if n.tried.fits]
        total = sum(n.tried.weight for n in named)
        if fitting:
            rivals = sorted(fitting, key=lambda n: -n.tried.weight)
            first, *others = [_cause(scene, n, named, total) for n in rivals[:SHOWN]]
            return [first, *(c for c in others if c.confidence >= LEAST)]
        told = sorted(patterns, key=lambda p: -p[1].confidence)
        if told:
            return [_told(kind, pattern) for kind, pattern in told[:SHOWN]]
        return [_unknown(scene, bar, named)]


def _first_points(findings: list[Finding]) -> list[str]:
    """The first point that differs, and what else is wrong beside it though its input is right, in order."""
    compared = [f for f in findings if f.verdict == "fail" and f.check in COMPARING]
    measured = [f for f in compared if f.metric not in UNMEASURED]
    failing = sorted(measured or compared, key=lambda f: (f.origin == "inherited", f.order))
    if not failing:
        return []
    first = failing[0]
    near = [f for f in failing if f.origin == first.origin and _beside(f.point, first.point)]
    return list(dict.fromkeys(f.point for f in near))[:EXPLAINED_POINTS]


def _beside(point: str, first: str) -> bool:
    """Whether both are of one module, or outputs of modules with one parent."""
    (module, port, _), (other, other_port, _) = split_key(point), split_key(first)
    return module == other or (not port and not other_port and module.rpartition(".")[0] == other.rpartition(".")[0])


def _cause(scene: Scene, best: Named, named: list[Named], total: float) -> Cause:
    tried = best.tried
    confidence = (1 - tried.residual**2) * tried.weight / total
    rivals = [n for n in named if n is not best]
    next_best = min(rivals, key=lambda n: n.tried.residual, default=None)
    text = f"{tried.trial.label} at {scene.module or 'the output'} the reference gives the candidate's numbers: "
    text += f"{tried.residual:.1e} of the difference is left"
    if next_best is not None:
        text += f" (next best, {next_best.kind.name}: {min(next_best.tried.residual, 9.9):.1e})"
    return Cause(code=best.kind.code, name=best.kind.name, confidence=round(confidence, 3), evidence=text)


def _told(kind: CauseKind, pattern: Pattern) -> Cause:
    return Cause(code=kind.code, name=kind.name, confidence=pattern.confidence, evidence=pattern.label)


def _unknown(scene: Scene, bar: Bar, named: list[Named]) -> Cause:
    best = min(named, key=lambda n: n.tried.residual, default=None)
    near = ""
    if best is not None and best.tried.residual < 1:
        near = f"; nearest was {best.kind.name}, which leaves {best.tried.residual:.0%} of the difference"
    text = f"none of {len(named)} causes that were tested explains it{near}; {describe(scene, bar)}"
    return Cause(code=UNKNOWN.code, name=UNKNOWN.name, confidence=0.0, evidence=text)
