"""Why it differs: the causes of the first points that fail, each a hypothesis that was tested.

For each of these points the hypotheses of every cause are held against the candidate's rows (``trial`` says how they
are scored). What fits is named, at most three causes; where nothing does, cause ``unknown`` shows the evidence.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from paritykit.captures.manifest import split_key
from paritykit.captures.reader import Capture
from paritykit.comparison.floor import FACTOR
from paritykit.comparison.tolerance import POSITION_FACTOR, Tolerance, fallback
from paritykit.diagnose.catalogue import CAUSES, UNKNOWN, CauseKind
from paritykit.diagnose.evidence import describe
from paritykit.diagnose.known import weights_of
from paritykit.diagnose.scene import ReadTensor, Scene
from paritykit.diagnose.trial import Bar, Pattern, Trial, Tried
from paritykit.errors import ParityError
from paritykit.mapping.rules import Rule
from paritykit.results import Cause, Finding

log = logging.getLogger(__name__)
SHOWN = 3
PREDICTED = 4.0
"""Times what an engine is allowed: a prediction rounds in its own way, and its angles at late positions most."""
COMPARING = ("modules", "logits", "tokens")
"""Checks whose findings are explained by what was captured."""
EXPLAINED_POINTS = 3
"""Points that are explained: the first, and modules beside it that differ too, though what they were fed is right."""
ODD = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, ParityError)
"""What a hypothesis may stumble over in a model it was not thought of for; it is dropped then, and the others go on."""


@dataclass(frozen=True)
class Named:
    """A cause with its best hypothesis."""

    kind: CauseKind
    tried: Tried


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Two captures, the rules between them by the reference's point, and the reference's checkpoint."""

    reference: Capture
    candidate: Capture
    rules: Mapping[str, Rule]
    config: Mapping[str, Any] | None = None
    read: ReadTensor | None = None

    def scene(self, point: str, findings: list[Finding]) -> Scene:
        """The scene of a point, from its findings in all cases: those that fail come first, the short ones before."""
        failing = [f for f in findings if f.verdict == "fail"]
        cases = self.reference.cases
        first = sorted((f.case for f in failing), key=lambda c: cases[c].positions)
        return Scene(
            reference=self.reference,
            candidate=self.candidate,
            rules=self.rules,
            point=point,
            located=failing[0].located,
            cases=dict.fromkeys([*first, *cases]),
            allowed=_allowed(findings),
            config=self.config,
            read=self.read,
        )


def explain(
    findings: Iterable[Finding],
    *,
    reference: Capture,
    candidate: Capture,
    rules: Iterable[Rule],
    config: Mapping[str, Any] | None = None,
    read: ReadTensor | None = None,
) -> list[Finding]:
    """``findings`` with causes at the first points that differ; the others as they are.

    ``rules`` are the mapping between both captures, ``config`` and ``read`` the reference's checkpoint.
    """
    known = list(findings)
    table = {r.reference: r for r in rules}
    sides = Sides(reference=reference, candidate=candidate, rules=table, config=config, read=read)
    by_point: dict[str, list[Finding]] = defaultdict(list)
    for finding in known:
        if finding.check in COMPARING:
            by_point[finding.point].append(finding)
    made = {p: _explained(p, by_point[p], known, sides) for p in _first_points(known)}
    return [
        msgspec.structs.replace(f, causes=made[f.point])
        if f.verdict == "fail" and f.check in COMPARING and f.point in made
        else f
        for f in known
    ]


def _explained(point: str, findings: list[Finding], known: list[Finding], sides: Sides) -> list[Cause]:
    """The causes of one point. What check ``weights`` says of its module comes first: it looked at the weights."""
    if point not in sides.rules or point not in sides.reference.points:
        return [_not_computed(findings[0], f"there is no computation to test at {point}")]
    parameters: dict[str, str] = sides.reference.manifest.facts.get("parameters", {})
    told = weights_of(known, split_key(point)[0], parameters)
    try:
        scene = sides.scene(point, findings)
        tested = causes_of(scene) if scene.cases else []
    except ODD as error:
        log.debug("%s cannot be explained: %s: %s", point, type(error).__name__, error)
        tested = [_not_computed(findings[0], f"{point} cannot be looked at: {error}")]
    sure = {c.name: c for c in reversed(told)}
    others = [c for c in tested if c.name not in sure and not (told and c.name == UNKNOWN.name)]
    return [*sure.values(), *others][:SHOWN]


def _not_computed(finding: Finding, why: str) -> Cause:
    """The cause of what is no tensor: a token chosen from equal logits, a point of another size."""
    text = f"{why}: {finding.message}" if finding.message else why
    return Cause(code=UNKNOWN.code, name=UNKNOWN.name, confidence=0.0, evidence=text)


def causes_of(scene: Scene) -> list[Cause]:
    """The causes that fit, best first, at most three; ``unknown`` with what can be seen where none does."""
    with torch.inference_mode():
        bar = Bar(scene)
        if not bar.wrong.any():
            return []
        named, patterns = _tried(scene, bar)
        fitting = [n for n in named if n.tried.fits]
        total = sum(n.tried.weight for n in named)
        if fitting:
            rivals = sorted(fitting, key=lambda n: -n.tried.weight)
            return [_cause(scene, n, named, total) for n in rivals[:SHOWN]]
        told = sorted(patterns, key=lambda p: -p[1].confidence)
        if told:
            return [_told(kind, pattern) for kind, pattern in told[:SHOWN]]
        return [_unknown(scene, bar, named)]


def _first_points(findings: list[Finding]) -> list[str]:
    """The first point that differs, and what else is wrong beside it though its input is right, in order."""
    compared = [f for f in findings if f.verdict == "fail" and f.check in COMPARING]
    failing = sorted(compared, key=lambda f: (f.origin == "inherited", f.order))
    if not failing:
        return []
    first = failing[0]
    near = [f for f in failing if f.origin == first.origin and _beside(f.point, first.point)]
    return list(dict.fromkeys(f.point for f in near))[:EXPLAINED_POINTS]


def _beside(point: str, first: str) -> bool:
    """Whether both are of one module, or outputs of modules with one parent."""
    (module, port, _), (other, other_port, _) = split_key(point), split_key(first)
    return module == other or (not port and not other_port and module.rpartition(".")[0] == other.rpartition(".")[0])


def _allowed(findings: list[Finding]) -> Tolerance:
    """What was allowed at a point, from how it was judged: the most of all cases, whose rows are held together."""
    found = [_whole(f) for f in findings if f.noise_floor or (f.allowed and f.metric in ("rel_l2", "position_rel_l2"))]
    whole = max(found, default=fallback("float32", depth=findings[0].order))
    return Tolerance(whole, whole * POSITION_FACTOR, findings[0].allowed_source)


def _whole(finding: Finding) -> float:
    """What a whole point was allowed; more beside a noise floor, see ``PREDICTED``."""
    if finding.noise_floor:
        return PREDICTED * FACTOR * finding.noise_floor
    assert finding.allowed is not None
    return finding.allowed if finding.metric == "rel_l2" else finding.allowed / POSITION_FACTOR


def _tried(scene: Scene, bar: Bar) -> tuple[list[Named], list[tuple[CauseKind, Pattern]]]:
    """The best hypothesis of each cause, and the patterns that were seen."""
    named: list[Named] = []
    patterns: list[tuple[CauseKind, Pattern]] = []
    for kind in [kind for _, kind in CAUSES.items()]:
        tried: list[Tried] = []
        for found in _hypotheses(kind, scene):
            if isinstance(found, Pattern):
                patterns.append((kind, found))
                continue
            held = _guarded(kind, found.label, lambda found=found: bar.hold(found))  # type: ignore[misc]
            if held is not None:
                tried.append(held)
        if tried:
            named.append(Named(kind, max(tried, key=lambda t: (t.fits, t.weight))))
    return named, patterns


def _hypotheses(kind: CauseKind, scene: Scene) -> Iterator[Trial | Pattern]:
    for target in kind.tests:
        try:
            yield from kind.source(target)(scene)
        except ODD as error:
            log.debug("%s is not tested further at %s: %s: %s", kind.name, scene.point, type(error).__name__, error)


def _guarded(kind: CauseKind, label: str, hold: Callable[[], Tried]) -> Tried | None:
    try:
        return hold()
    except ODD as error:
        log.debug("%s, %s, cannot be tested: %s: %s", kind.name, label, type(error).__name__, error)
        return None


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
