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

from paritykit.captures.reader import Capture
from paritykit.comparison.tolerance import POSITION_FACTOR, Tolerance, fallback
from paritykit.diagnose.catalogue import CAUSES, UNKNOWN, CauseKind
from paritykit.diagnose.evidence import describe
from paritykit.diagnose.scene import ReadTensor, Scene
from paritykit.diagnose.trial import Bar, Pattern, Tried, Trial
from paritykit.mapping.rules import Rule
from paritykit.results import Cause, Finding

log = logging.getLogger(__name__)
SHOWN = 3
EXPLAINED_POINTS = 3
"""Points that are explained: the first, and others of its layer that have a reason of their own."""
ODD = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError, NotImplementedError)
"""What a hypothesis may stumble over in a model it was not thought of for; it is dropped then, and the others go on."""


@dataclass(frozen=True)
class Named:
    """A cause with its best hypothesis."""

    kind: CauseKind
    tried: Tried


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
    by_point: dict[str, list[Finding]] = defaultdict(list)
    for finding in known:
        by_point[finding.point].append(finding)
    made: dict[str, list[Cause]] = {}
    table = {r.reference: r for r in rules}
    for point in _first_points(known):
        if point in table and point in reference.points:
            scene = _scene(point, by_point[point], reference, candidate, table, config, read)
            made[point] = causes_of(scene) if scene.cases else []
    return [
        msgspec.structs.replace(f, causes=made[f.point]) if f.verdict == "fail" and f.point in made else f
        for f in known
    ]


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
    """The first point that differs in each case, and what else is wrong beside it with right inputs, in order."""
    failing = sorted((f for f in findings if f.verdict == "fail"), key=lambda f: (f.origin == "inherited", f.order))
    if not failing:
        return []
    first = failing[0]
    near = [f for f in failing if f.origin == first.origin and _layer(f.point) == _layer(first.point)]
    return list(dict.fromkeys(f.point for f in near))[:EXPLAINED_POINTS]


def _layer(point: str) -> str:
    from paritykit.diagnose.scene import LAYER

    found = LAYER.match(point)
    return found[1] if found else point


def _scene(
    point: str,
    findings: list[Finding],
    reference: Capture,
    candidate: Capture,
    rules: Mapping[str, Rule],
    config: Mapping[str, Any] | None,
    read: ReadTensor | None,
) -> Scene:
    failing = [f for f in findings if f.verdict == "fail"]
    short = sorted(failing, key=lambda f: (f.positions is None, reference.cases[f.case].positions))
    others = [c for c in reference.cases if c not in {f.case for f in short}]
    return Scene(
        reference=reference,
        candidate=candidate,
        rules=rules,
        point=point,
        located=failing[0].located,
        cases=[*dict.fromkeys(f.case for f in short), *others],
        allowed=_allowed(findings),
        config=config,
        read=read,
    )


def _allowed(findings: list[Finding]) -> Tolerance:
    """What was allowed at a point, from how it was judged."""
    for finding in findings:
        if finding.allowed and finding.metric in ("rel_l2", "position_rel_l2"):
            whole = finding.allowed / (POSITION_FACTOR if finding.metric == "position_rel_l2" else 1.0)
            return Tolerance(whole, whole * POSITION_FACTOR, finding.allowed_source)
    whole = fallback("float32", depth=findings[0].order)
    return Tolerance(whole, whole * POSITION_FACTOR, "")


def _tried(scene: Scene, bar: Bar) -> tuple[list[Named], list[tuple[CauseKind, Pattern]]]:
    """The best hypothesis of each cause, and the patterns that were seen."""
    named: list[Named] = []
    patterns: list[tuple[CauseKind, Pattern]] = []
    for _, kind in CAUSES.items():
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
    for source in kind.sources():
        try:
            yield from source(scene)
        except ODD as error:  # noqa: PERF203
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
