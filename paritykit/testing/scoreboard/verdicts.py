"""What ParityKit and the simpler judges say of a candidate's capture, as it is kept in an outcome."""

from __future__ import annotations

from typing import Any

import msgspec

from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.config import load_config
from paritykit.results import Cause, Results
from paritykit.runner import compare_captures
from paritykit.testing.faults import Fault, find
from paritykit.testing.faults.page import HEADINGS
from paritykit.testing.scoreboard.ground import Sides
from paritykit.testing.scoreboard.judges import judge_simply
from paritykit.testing.scoreboard.outcome import Outcome
from paritykit.testing.scoreboard.places import is_near, named, shown
from paritykit.testing.scoreboard.plan import CAPTURED, Trial
from paritykit.testing.scoreboard.strength import subject_of


class Held:
    """An engine that is open and stays so: what is planted in it is there when its modules are replayed."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def open(self) -> None:
        """It is open."""

    def close(self) -> None:
        """Others need it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def compare(sides: Sides, candidate: Capture, engine: Any) -> Results:
    """What a run says by default: the noise floor as the only tolerance, modules replayed and causes where it fails."""
    return compare_captures(
        sides.truth,
        candidate,
        twin=sides.twin,
        ensemble=sides.ensemble,
        draw=sides.draw,
        checks=captured(sides.cases),
        config=load_config({}, environ={}),
        engine=Held(engine),
    )


def captured(cases: list[Case]) -> list[str]:
    """The checks that compare captures of these cases: where no token is chosen there are none to compare."""
    return [name for name in CAPTURED if name != "tokens" or any(c.new_tokens for c in cases)]


def blank(trial: Trial, **known: Any) -> Outcome:
    """An outcome with what is known before anything has run."""
    fault = find(trial.fault) if trial.fault else None
    group = HEADINGS.get(fault.kind, fault.kind) if fault else ""
    return Outcome(trial=trial, group=group, cause=fault.cause if fault else "", **known)


def told(outcome: Outcome, results: Results) -> Outcome:
    """``outcome`` with verdict, failing checks and causes; added to those of checks that were asked before."""
    failed = sorted({f.check for f in results.findings if f.verdict == "fail"} | set(outcome.failed))
    checks = find(outcome.trial.fault).checks if outcome.trial.fault else ()
    causes = [c.name for c in explained(results)]
    verdicts = (outcome.verdict, results.summary.verdict)
    return msgspec.structs.replace(
        outcome,
        verdict="fail" if "fail" in verdicts else results.summary.verdict,
        failed=failed,
        found_by=[c for c in failed if c in checks],
        causes=outcome.causes or causes,
        unaided=causes if outcome.causes else [],
        inconclusive=outcome.inconclusive + results.summary.inconclusive,
    )


def explained(results: Results) -> list[Cause]:
    """The causes of a run's first divergence, or where its check explains nothing, those of the first that has some."""
    return results.summary.causes or next((f.causes for f in results.findings if f.causes), [])


def placed(outcome: Outcome, results: Results, sides: Sides, *, fault: Fault, layer: int) -> Outcome:
    """``outcome`` with where the fault was seen, if the fault is at a place and anything was named."""
    wanted = fault.at(layer=layer)
    place = shown(wanted, {f.point for f in results.findings})
    where = named(results.summary.first_divergence, wanted)
    if not wanted or not where:
        return msgspec.structs.replace(outcome, wanted=place if wanted else "", named=where)
    exact = where in (wanted, place)
    near = exact or is_near(where, place, sides.truth.manifest)
    return msgspec.structs.replace(outcome, wanted=place, named=where, exact=exact, near=near)


def means_another(results: Results, wanted: str) -> bool:
    """Whether the point of a fault, or what the engine shows of it, is told as one that means something else."""
    place = shown(wanted, {f.point for f in results.findings})
    return any(f.means_another for f in results.findings if f.point == place)


def simply(outcome: Outcome, sides: Sides, candidate: Capture) -> Outcome:
    """``outcome`` with what the simpler judges say."""
    mapping = subject_of(sides.truth, sides.twin, candidate).mapping
    return msgspec.structs.replace(outcome, judges=judge_simply(sides.twin, candidate, mapping))
