"""A check of invariance over drawn workloads, one way to run the engine after the other: engines start rarely."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial

import msgspec

from paritykit.case import Case, CaseSet
from paritykit.checks.base import LOGITS, Answer, InvarianceCheck
from paritykit.engines.checkpoint import Checkpoint
from paritykit.invariance.explore import Ground, Profile, known_edges, smallest_failing
from paritykit.invariance.judge import arguments_of, badness
from paritykit.invariance.laboratory import Laboratory
from paritykit.invariance.trial import Arguments
from paritykit.models import cases_for
from paritykit.results import Coverage, Finding
from paritykit.session import Session

LONGEST, MARGIN = 200, 16
"""Longest prompt that is drawn, and the positions left after it."""
WHOLE = CaseSet(["len-2+1"])
"""Where no workload differs, this one is compared at every point, and what is asked of the model as a whole with it."""
BLOCK = 16
"""Where an engine does not say how long its blocks are."""


class Exploration(msgspec.Struct, kw_only=True):
    """What was found: with a failure its smallest workload, otherwise the worst of each point over all ``tried``."""

    answer: Answer
    failing: list[Case] = []
    tried: int = 0


def explore(session: Session, check: InvarianceCheck, *, checkpoint: Checkpoint, profile: Profile) -> Exploration:
    """Draw workloads for every way in which ``check`` runs the engine, until one fails. Raises EngineError."""
    search = _Search(session, check, checkpoint, profile)
    for arguments in search.ways():
        smallest = smallest_failing(
            partial(search.fails, arguments=arguments),
            search.ground,
            name=f"{check.name} {checkpoint.digest[:12]} {msgspec.json.encode(arguments, order='sorted').decode()}",
            profile=profile,
        )
        cases = search.resolve(WHOLE if smallest is None else smallest)
        answer = search.look(cases, arguments)
        if smallest is not None or differs(answer):
            return Exploration(answer=answer, failing=cases, tried=search.tried)
    return Exploration(answer=search.answer(), tried=search.tried)


class _Search:
    def __init__(self, session: Session, check: InvarianceCheck, checkpoint: Checkpoint, profile: Profile) -> None:
        self._session, self._check, self._checkpoint, self._profile = session, check, checkpoint, profile
        self._answers: list[Answer] = []
        self.tried = 0
        block = int(session.candidate_args.get("block_size") or BLOCK)
        window = int(checkpoint.text_config.get("sliding_window") or 0)
        longest = min(LONGEST, (checkpoint.max_positions or LONGEST + MARGIN) - MARGIN)
        self.ground = Ground(block_size=block, window=window, longest=max(1, longest))

    def ways(self) -> list[Arguments]:
        """Each set of arguments that the check runs the engine with; the plain one where it runs it in no other."""
        with self._bench(self.resolve(known_edges(self.ground)), points=(LOGITS,)) as laboratory:
            return arguments_of(laboratory, self._check.name) or [{}]

    def resolve(self, workload: CaseSet) -> list[Case]:
        """The cases of a workload."""
        return cases_for(self._checkpoint, workload)

    def fails(self, workload: CaseSet, arguments: Arguments) -> bool:
        """Whether a workload differs; only what the check looks at first is recorded."""
        return differs(self.look(self.resolve(workload), arguments, points=self._check.looks))

    def look(self, cases: list[Case], arguments: Arguments, *, points: tuple[str, ...] | None = None) -> Answer:
        """What the check finds on these cases."""
        with self._bench(cases, points=points) as laboratory:
            answer: Answer = self._check.run(laboratory, only=arguments)
        self.tried += 1
        self._answers.append(answer)
        return answer

    def answer(self) -> Answer:
        """All answers as one: the worst finding of each point, and all that was skipped."""
        found = worst(f for a in self._answers for f in a.findings)
        told = f"the worst of {self.tried} workloads"
        findings = [msgspec.structs.replace(f, message=f.message or told) for f in found]
        skipped = list({(u.point, u.reason): u for a in self._answers for u in a.coverage.skipped}.values())
        compared = len(findings)
        coverage = Coverage(check=self._check.name, points=compared, compared=compared, skipped=skipped)
        return Answer(coverage=coverage, findings=findings)

    def _bench(self, cases: list[Case], *, points: tuple[str, ...] | None) -> AbstractContextManager[Laboratory]:
        return self._session.bench(cases, points=points, thorough=self._profile.thorough)


def differs(answer: Answer) -> bool:
    """Whether anything is wrong."""
    return any(f.verdict in ("fail", "error") for f in answer.findings)


def worst(findings: Iterable[Finding]) -> list[Finding]:
    """Of the findings of each point the worst, in execution order."""
    kept: dict[str, Finding] = {}
    for finding in findings:
        old = kept.get(finding.point)
        if old is None or badness(finding) > badness(old):
            kept[finding.point] = finding
    return sorted(kept.values(), key=lambda f: f.order)
