"""Hypotheses are held against a few positions first, and those that fit there against all.

What is wrong by one cause is wrong by it wherever it shows, so that a hypothesis that does not explain the first
positions explains no more of them. Most are refuted so at a small part of the cost; what is left is told apart, and
measured, over all positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from paritykit.diagnose.catalogue import CAUSES, CauseKind
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Bar, Pattern, Trial, Tried
from paritykit.errors import ParityError

log = logging.getLogger(__name__)
ENOUGH = 64
"""Positions of a first look."""
WRONG = 16
"""Of them, how many of a case must be wrong, where so many are."""
GAIN = 2
"""Times that there must be more positions for a first look to save anything."""
ODD = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, ParityError)
"""What a hypothesis may stumble over in a model it was not thought of for; it is dropped then, and the others go on."""


@dataclass(frozen=True)
class Named:
    """A cause with its best hypothesis."""

    kind: CauseKind
    tried: Tried


@dataclass
class Tested:
    """What came of all hypotheses: the best of each cause, the patterns that were seen, and the labels that fit."""

    named: list[Named] = field(default_factory=list)
    patterns: list[tuple[CauseKind, Pattern]] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)

    @property
    def refuted(self) -> set[str]:
        """Causes that were tested and explain nothing."""
        return {n.kind.name for n in self.named if not n.tried.fits}


def screen(scene: Scene, bar: Bar) -> Tested:
    """All hypotheses of all causes, held against the scene's point."""
    limits = first_look(scene, bar)
    if sum(limits.values()) * GAIN > len(bar.wrong):
        return hold_all(scene, bar)
    part = scene.cut(limits)
    first = hold_all(part, Bar(part))
    found = hold_all(scene, bar, leaving=first.refuted, labels=first.labels)
    refuted = first.refuted
    return Tested(
        [*found.named, *(n for n in first.named if n.kind.name in refuted)],
        [*found.patterns, *(p for p in first.patterns if p[0].name in refuted)],
    )


def first_look(scene: Scene, bar: Bar) -> dict[str, int]:
    """So many positions of the first cases: from the beginning on, until enough of them are wrong."""
    found: dict[str, int] = {}
    start = 0
    for case in scene.cases:
        length = scene.length(case)
        wrong = bar.wrong[start : start + length].nonzero().flatten().tolist()
        shows = wrong[min(WRONG, len(wrong)) - 1] + 1 if wrong else length
        found[case] = min(length, max(shows, ENOUGH - sum(found.values())))
        start += length
        if sum(found.values()) >= ENOUGH:
            break
    return found


def hold_all(scene: Scene, bar: Bar, *, leaving: Collection[str] = (), labels: Collection[str] | None = None) -> Tested:
    """Every hypothesis but those of the causes ``leaving``; with ``labels`` of the rest those, and what is fitted."""
    found = Tested()
    for kind in (k for name, k in CAUSES.items() if name not in leaving):
        tried: list[Tried] = []
        for made in hypotheses(kind, scene):
            if isinstance(made, Pattern):
                found.patterns.append((kind, made))
            elif labels is None or made.free or made.label in labels:
                held = _guarded(kind, made.label, lambda made=made: bar.hold(made))  # type: ignore[misc]
                tried += [held] if held is not None else []
                found.labels |= {made.label} if held is not None and held.fits else set()
        if tried:
            found.named.append(Named(kind, max(tried, key=lambda t: (t.fits, t.weight))))
    return found


def hypotheses(kind: CauseKind, scene: Scene) -> Iterator[Trial | Pattern]:
    """What a cause's tests make of a scene, as far as they get."""
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
