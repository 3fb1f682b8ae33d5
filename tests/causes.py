"""Faults explained: what a planted run is held to be wrong with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paritykit.audit import audit
from paritykit.captures.reader import Capture
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.engine import NanoEngine
from paritykit.errors import ParityError
from paritykit.results import Cause
from paritykit.runner import audit_results, weight_results
from paritykit.testing.faults import FAULTS, Fault
from tests.faulty import Ground, Trial, homes

EXPLAINED = [f for _, f in FAULTS.items() if f.kind != "null" and "nano" in f.engines]


@dataclass(frozen=True)
class Answer:
    """What one fault in one model is said to be caused by: ``source`` is what was looked at."""

    fault: Fault
    model: str
    source: str
    causes: list[Cause]

    @property
    def first(self) -> bool:
        return bool(self.causes) and self.causes[0].name == self.fault.cause

    @property
    def among(self) -> bool:
        return any(c.name == self.fault.cause for c in self.causes)

    def told(self) -> str:
        said = "; ".join(f"{c.name} {c.confidence:.2f}: {c.evidence}" for c in self.causes) or "nothing"
        return f"{self.fault.name} in {self.model} ({self.source}): wanted {self.fault.cause}, said {said[:300]}"


def answers(ground: Ground, fault: Fault, name: str, folder: Path) -> Iterator[Answer]:
    """What is said of a fault: from captures; of one in loading from the ledger too; of a file from its audit."""
    made = Trial(ground, fault, name, homes(fault)[name])
    if fault.stage == "checkpoint":
        damaged = fault.damage(made.model, folder / f"{fault.name}-{name}", layer=made.layer)
        if "checkpoint" in fault.checks:
            results = audit_results(audit(damaged), "model")
            yield Answer(fault, name, "audit", results.summary.causes)
        else:
            yield Answer(fault, name, "captures", made.explained(ran(ground, made, damaged)).summary.causes)
    elif fault.stage == "loading":
        engine = NanoEngine(str(made.model), **fault.when.arguments, **fault.arguments(layer=made.layer))
        engine.open()
        try:
            told = weight_results(engine.ledger(), engine.describe(), Checkpoint.find(str(made.model)))
            captured = ground.run(engine, made.cases)
        finally:
            engine.close()
        yield Answer(fault, name, "ledger", told.summary.causes)
        yield Answer(fault, name, "captures", made.explained(captured).summary.causes)
    else:
        yield Answer(fault, name, "captures", made.explained(made.planted()).summary.causes)


def ran(ground: Ground, made: Trial, folder: Path) -> Capture:
    engine = NanoEngine(str(folder), provenance=False, **made.fault.when.arguments)
    try:
        engine.open()
        return ground.run(engine, made.cases)
    except ParityError as error:
        raise AssertionError(f"{made.fault.name}: {error}") from error
    finally:
        engine.close()
