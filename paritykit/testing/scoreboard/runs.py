"""Carrying a trial out: plant what is to be planted, run, compare, and keep what was said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from paritykit.audit import audit
from paritykit.captures.reader import Capture
from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import EngineError, ParityError
from paritykit.runner import audit_results, weight_results
from paritykit.testing.faults import Fault, find, planted
from paritykit.testing.folders import without_folders
from paritykit.testing.scoreboard.ground import Ground, Sides
from paritykit.testing.scoreboard.models import layer_of, model_of
from paritykit.testing.scoreboard.outcome import Outcome
from paritykit.testing.scoreboard.places import shown
from paritykit.testing.scoreboard.plan import LEVELS, Trial, alone_sees, only_audited
from paritykit.testing.scoreboard.strength import find_strength, ratio_at, subject_of
from paritykit.testing.scoreboard.varied import vary
from paritykit.testing.scoreboard.verdicts import blank, compare, means_another, placed, simply, told


def run_trial(ground: Ground, trial: Trial) -> Outcome:
    """What comes of a trial; what an engine cannot do is an outcome too."""
    started = time.monotonic()
    try:
        outcome = _way(trial)(ground, trial)
    except ParityError as error:
        if isinstance(error, EngineError):
            ground.close()
        outcome = blank(trial, error=reason_of(error))
    finally:
        ground.drop_local()
    return msgspec.structs.replace(outcome, seconds=round(time.monotonic() - started, 2))


def reason_of(error: ParityError) -> str:
    """The first line of an error, without folders of this machine, which its end names too."""
    said = without_folders(next(iter(str(error).splitlines()), "")).removesuffix("; the engine's last words:")
    return f"{type(error).__name__}: {said}"[:400]


def _way(trial: Trial) -> Callable[[Ground, Trial], Outcome]:
    fault = find(trial.fault) if trial.fault else None
    if fault is None:
        return vary if trial.checks else run_clean
    if fault.kind != "null" and alone_sees(fault, trial.engine):
        return vary
    return {"live": run_live, "host": run_live, "loading": run_loading, "checkpoint": run_damaged}[fault.stage]


def run_clean(ground: Ground, trial: Trial) -> Outcome:
    """A pair without a fault."""
    sides = _sides(ground, trial)
    engine = ground.engine(trial.engine, model_of(trial.model), dtype=trial.dtype, **trial.arguments)
    return _judged(ground, blank(trial), sides, ground.run(engine, sides.cases), engine=engine)


def run_live(ground: Ground, trial: Trial) -> Outcome:
    """A fault in an open engine, as strong as its level asks for."""
    fault, layer = find(trial.fault), layer_of(find(trial.fault), trial.model)
    sides = _sides(ground, trial)
    engine = ground.engine(trial.engine, model_of(trial.model), dtype=trial.dtype, **trial.arguments)

    def measure(strength: float) -> float | None:
        with planted(engine, fault, layer=layer, strength=strength):
            found = ground.run(engine, sides.cases)
        ratio = _ratio(found, sides, fault.at(layer=layer))
        ground.drop(found)
        return ratio

    full = measure(1.0) if fault.point else None
    strength, target = 1.0, LEVELS[trial.level]
    if target:
        if full is None or full < target:
            return blank(trial, full=full, ratio=full, quiet=True)
        strength, _ = find_strength(measure, target=target, full=full)
    with planted(engine, fault, layer=layer, strength=strength):
        candidate = ground.run(engine, sides.cases)
        ratio = _ratio(candidate, sides, fault.at(layer=layer))
        begun = blank(trial, strength=strength, ratio=ratio, full=full)
        return _judged(ground, begun, sides, candidate, engine=engine, fault=fault, layer=layer)


def run_loading(ground: Ground, trial: Trial) -> Outcome:
    """A fault between the files and the engine: the ledger is asked first, as in any run."""
    fault, layer = find(trial.fault), layer_of(find(trial.fault), trial.model)
    sides, model = _sides(ground, trial), model_of(trial.model)
    arguments = {"dtype": trial.dtype, **trial.arguments, **fault.arguments(layer=layer)}
    with ground.passing(trial.engine, model, **arguments) as engine:
        weights = weight_results(engine.ledger(), engine.describe(), Checkpoint.find(str(model)))
        candidate = ground.run(engine, sides.cases)
        begun = blank(trial, ratio=_ratio(candidate, sides, fault.at(layer=layer)))
        return _judged(ground, told(begun, weights), sides, candidate, engine=engine, fault=fault, layer=layer)


def run_damaged(ground: Ground, trial: Trial) -> Outcome:
    """A fault in the files: they are audited first, and run where that is to find it too."""
    fault, layer = find(trial.fault), layer_of(find(trial.fault), trial.model)
    sides = _sides(ground, trial)
    folder = ground.scratch()
    damaged = fault.damage(model_of(trial.model), folder, layer=layer)
    outcome = told(blank(trial), audit_results(audit(damaged), trial.model))
    if not only_audited(fault) and "checkpoint" not in outcome.failed:
        outcome = blank(trial)
    try:
        with ground.passing(trial.engine, damaged, dtype=trial.dtype, **trial.arguments) as engine:
            candidate = ground.run(engine, sides.cases)
            if only_audited(fault):
                return simply(outcome, sides, candidate)
            begun = msgspec.structs.replace(outcome, ratio=_ratio(candidate, sides, fault.at(layer=layer)))
            return _judged(ground, begun, sides, candidate, engine=engine, fault=fault, layer=layer)
    except ParityError:
        if only_audited(fault):
            return outcome
        raise
    finally:
        ground.remove(folder)


def _judged(
    ground: Ground,
    outcome: Outcome,
    sides: Sides,
    candidate: Capture,
    *,
    engine: Any,
    fault: Fault | None = None,
    layer: int = 0,
) -> Outcome:
    results = compare(sides, candidate, engine)
    outcome = simply(told(outcome, results), sides, candidate)
    if fault is not None and fault.kind != "null":
        if outcome.found_by:
            outcome = placed(outcome, results, sides, fault=fault, layer=layer)
        elif not outcome.failed:
            outcome = msgspec.structs.replace(outcome, alike=means_another(results, fault.at(layer=layer)))
    ground.drop(candidate)
    return outcome


def _sides(ground: Ground, trial: Trial) -> Sides:
    return ground.sides(model_of(trial.model), dtype=trial.dtype, cases=trial.cases())


def _ratio(candidate: Capture, sides: Sides, wanted: str) -> float | None:
    subject = subject_of(sides.truth, sides.twin, candidate, ensemble=sides.ensemble)
    return ratio_at(subject, shown(wanted, {r.reference for r in subject.mapping.rules}))
