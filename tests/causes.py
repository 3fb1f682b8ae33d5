"""Faults explained: what a planted run is held to be wrong with, and where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paritykit.audit import audit
from paritykit.captures.reader import Capture
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.engine import NanoEngine
from paritykit.errors import ParityError
from paritykit.results import Cause, Results
from paritykit.runner import audit_results, weight_results
from paritykit.testing.faults import FAULTS, Fault
from tests.faulty import Ground, Trial, homes

EXPLAINED = [f for _, f in FAULTS.items() if f.kind != "null" and "nano" in f.engines]
NEAR = 1.25
"""How near a fault is brought to so many times the floor."""
TRIES = 3


@dataclass(frozen=True)
class Answer:
    """What one fault in one model is said to be caused by: ``source`` is what was looked at.

    ``found``: the run failed. ``exact``: at the point that the fault is in, where that is about a point.
    """

    fault: Fault
    model: str
    source: str
    causes: list[Cause]
    found: bool = True
    exact: bool = True

    @property
    def first(self) -> bool:
        return bool(self.causes) and self.causes[0].name == self.fault.cause

    @property
    def among(self) -> bool:
        return any(c.name == self.fault.cause for c in self.causes)

    def told(self) -> str:
        said = "; ".join(f"{c.name} {c.confidence:.2f}: {c.evidence}" for c in self.causes) or "nothing"
        wrong = "" if self.exact else " at another point"
        return f"{self.fault.name} in {self.model} ({self.source}): wanted {self.fault.cause}, said {said[:300]}{wrong}"


def answers(ground: Ground, fault: Fault, name: str, folder: Path) -> Iterator[Answer]:
    """What is said of a fault: from captures; of one in loading from the ledger too; of a file from its audit."""
    made = Trial(ground, fault, name, homes(fault)[name])
    if fault.stage == "checkpoint":
        damaged = fault.damage(made.model, folder / f"{fault.name}-{name}-{ground.dtype}", layer=made.layer)
        if "checkpoint" in fault.checks:
            results = audit_results(audit(damaged), "model")
            yield Answer(fault, name, "audit", results.summary.causes)
        else:
            yield answer(made, ran(ground, made, damaged))
    elif fault.stage == "loading":
        arguments = {**fault.when.arguments, **fault.arguments(layer=made.layer)}
        engine = NanoEngine(str(made.model), dtype=ground.dtype, **arguments)
        engine.open()
        try:
            told = weight_results(engine.ledger(), engine.describe(), Checkpoint.find(str(made.model)))
            captured = ground.run(engine, made.cases)
        finally:
            engine.close()
        yield Answer(fault, name, "ledger", told.summary.causes)
        yield answer(made, captured)
    else:
        yield answer(made, made.planted())


def faint_answers(ground: Ground, fault: Fault, name: str, *, times: float) -> Iterator[Answer]:
    """What is said of a fault that is so many times the noise floor; nothing of one that has no strength."""
    made = Trial(ground, fault, name, homes(fault)[name])
    strength = strength_of(made, times=times) if fault.graded and fault.stage == "live" else 0.0
    if strength:
        yield answer(made, made.planted(strength=strength))


def answer(made: Trial, candidate: Capture) -> Answer:
    """What is said of a candidate from captures."""
    results = made.explained(candidate)
    first, at = results.summary.first_divergence, made.fault.at(layer=made.layer)
    exact = first is not None and at in ("", first.point, first.seen_at, first.seen_at.partition("#")[0])
    causes = results.summary.causes
    return Answer(made.fault, made.name, "captures", causes, found=results.summary.verdict == "fail", exact=exact)


def strength_of(made: Trial, *, times: float) -> float:
    """The strength at which a fault is so many times the floor; 0 where that is more than all of it."""
    ratio = over_floor(made.compare(made.planted()), made)
    if not math.isfinite(ratio) or ratio < NEAR * times:
        return 0.0
    strength = times / ratio
    for _ in range(TRIES):
        ratio = over_floor(made.compare(made.planted(strength=strength)), made)
        if not ratio or 1 / NEAR < ratio / times < NEAR:
            break
        # Errors add up as squares: the floor itself is one of them.
        own, wanted = (math.sqrt(max(r**2 - 1, 0.01)) for r in (ratio, times))
        strength = min(1.0, strength * wanted / own)
    return strength


def over_floor(results: Results, made: Trial) -> float:
    """How many times the noise floor a fault is at its point."""
    at = [f for f in results.findings if f.point == made.fault.at(layer=made.layer)]
    return max((f.metrics.get("floor_ratio") or 0.0 for f in at), default=0.0)


def ran(ground: Ground, made: Trial, folder: Path) -> Capture:
    engine = NanoEngine(str(folder), dtype=ground.dtype, provenance=False, **made.fault.when.arguments)
    try:
        engine.open()
        return ground.run(engine, made.cases)
    except ParityError as error:
        raise AssertionError(f"{made.fault.name}: {error}") from error
    finally:
        engine.close()
