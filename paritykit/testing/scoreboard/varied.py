"""What only shows where an engine is held against itself: under other schedules, beside other requests."""

from __future__ import annotations

from typing import Any

import msgspec

from paritykit.config import load_config
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.process import HostPool
from paritykit.reference import ABOVE, Reference, Role
from paritykit.results import Results
from paritykit.session import Session
from paritykit.testing.faults import find
from paritykit.testing.scoreboard.ground import Ground
from paritykit.testing.scoreboard.judges import judge_simply
from paritykit.testing.scoreboard.models import layer_of, model_of
from paritykit.testing.scoreboard.outcome import Outcome
from paritykit.testing.scoreboard.places import is_near, named
from paritykit.testing.scoreboard.plan import CACHING, Trial, alone_sees
from paritykit.testing.scoreboard.verdicts import blank, captured, told


def vary(ground: Ground, trial: Trial) -> Outcome:
    """The checks of invariance that a fault names, or a clean pair is held against, after those of captures."""
    with _session(ground, trial) as session:
        results = session.results(
            [*captured(trial.cases()), *(trial.checks or alone_sees(find(trial.fault), trial.engine))]
        )
        outcome = told(blank(trial), results)
        subject = session.subject
        if subject.twin is not None:
            judges = judge_simply(subject.twin, subject.candidate, subject.mapping)
            outcome = msgspec.structs.replace(outcome, judges=judges)
        if trial.fault and outcome.found_by:
            outcome = _placed(outcome, results, session)
    return outcome


def _placed(outcome: Outcome, results: Results, session: Session) -> Outcome:
    fault = find(outcome.trial.fault)
    wanted = fault.at(layer=layer_of(fault, outcome.trial.model))
    where = named(results.summary.first_divergence, wanted)
    exact = where == wanted
    near = exact or is_near(where, wanted, session.reference.manifest)
    return msgspec.structs.replace(outcome, wanted=wanted, named=where, exact=exact, near=near)


def _session(ground: Ground, trial: Trial) -> Session:
    model, hosts = model_of(trial.model), HostPool()
    own: dict[str, Any] = {"dtype": trial.dtype, **trial.arguments}
    own.pop(CACHING, None)  # the check turns it on itself
    if trial.fault:
        fault = find(trial.fault)
        own |= fault.arguments(layer=layer_of(fault, trial.model))
    varied = HostPool()

    def closing() -> None:
        hosts.stop()
        varied.stop()

    return Session(
        reference=Reference(
            truth=Role(engine=HFEngine(str(model), dtype=ABOVE[trial.dtype], weights_dtype=trial.dtype)),
            twin=Role(engine=HFEngine(str(model), dtype=trial.dtype)),
        ),
        candidate=ground.make(trial.engine, model, hosts=hosts, **own),
        cases=trial.cases(),
        config=load_config({}, environ={}),
        checkpoint=Checkpoint.find(str(model)),
        vary=lambda more: ground.make(trial.engine, model, hosts=varied, **{**own, **more}),
        closing=closing,
    )
