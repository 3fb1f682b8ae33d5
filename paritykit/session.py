"""A run of two engines: started when needed, captured, compared, judged, and run again where that tells more."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from paritykit.audit import Audit
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.checks import CHECKS
from paritykit.checks.base import (
    Answer,
    Check,
    InvarianceCheck,
    ModelCheck,
    ModelSubject,
    ReferenceCheck,
    ReferenceSubject,
    Subject,
)
from paritykit.checks.routing import idle_experts
from paritykit.comparison.tolerance import check_overrides
from paritykit.config import Config, load_config
from paritykit.diagnose.edits.ask import SEARCH, EditFound, Question
from paritykit.engines.base import Engine, Progress
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.process import ProcessEngine
from paritykit.invariance.judge import add_findings
from paritykit.invariance.laboratory import Laboratory
from paritykit.invariance.pool import EnginePool, Make
from paritykit.ledger.expect import read_allowed
from paritykit.ledger.judge import judge_weights
from paritykit.ledger.subject import WeightSubject
from paritykit.machine import free_memory
from paritykit.mapping.build import build_mapping
from paritykit.mapping.user import UserRule
from paritykit.notes import Ran, attempt, notes_of
from paritykit.provenance.weightmap import RankLedger
from paritykit.records import assemble, case_infos, checkpoint_side, explain_findings, run_record
from paritykit.reference import Reference, Role, small_cache
from paritykit.reruns import Reruns
from paritykit.results import Coverage, Finding, Results, Run, Side, Unmatched
from paritykit.runner import policies_of, run_checks, weight_subject

T = TypeVar("T")
EDITED = 8
"""Times its files, what a reference takes that is edited: in float64 four times bfloat16, and as much on its way."""


class Session:
    """Two engines on the same cases. Captures are made on first need, the reference's first, one engine at a time.

    Use as a context manager: engines are closed and temporary captures removed on leaving it. ``vary`` makes the
    candidate with other arguments; ``closing`` is called last. With ``explain`` modules are replayed where a case
    fails, with ``local`` in every case: where it is None in the shortest, if none fails. With ``together`` the
    candidate's process starts while the truth is computed, with ``beside`` it also runs while twin and draws are.
    """

    def __init__(
        self,
        *,
        reference: Engine | Reference,
        candidate: Engine,
        cases: list[Case],
        config: Config | None = None,
        checkpoint: Checkpoint | None = None,
        rules: list[UserRule] | None = None,
        progress: Progress | None = None,
        vary: Make | None = None,
        closing: Callable[[], None] | None = None,
        explain: bool = True,
        local: bool | None = None,
        together: bool = False,
        beside: bool = False,
    ) -> None:
        self._local = local
        self._together = together and isinstance(candidate, ProcessEngine)
        self._beside = beside
        self._closing = closing
        self._explain = explain
        self._checkpoint = checkpoint
        self._pool = None if vary is None else EnginePool(vary)
        self.config = config or load_config()
        self._tolerance = check_overrides(self.config["tolerance"])
        self._allowed = read_allowed(self.config["allow"], source=self.config.source("allow"))
        self._policies = policies_of(self.config)
        self._candidate = candidate
        self._cases = cases
        self._rules = rules
        self._progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="paritykit-")
        self._starts: dict[str, int] = {}
        self._reference = reference if isinstance(reference, Reference) else Reference(truth=Role(engine=reference))
        self._reference.prepare(
            folder=Path(self._folder.name),
            cases=cases,
            progress=progress,
            keep=self._together and (explain or bool(local)),
        )
        self._opened = False
        self._frees = False
        self._ran: Capture | None = None
        self._free: dict[str, list[int]] | None = None
        self.notes: list[str] = []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open and remove the captures."""
        self._reference.close()
        if self._opened or self._together:
            self._opened = self._together = False
            self._candidate.close()
        if self._pool is not None:
            self._pool.close()
        self._folder.cleanup()
        if self._closing is not None:
            self._closing()

    @cached_property
    def reference(self) -> Capture:
        """The reference's capture, as truth, with the tokens it chose."""
        return self._reference.capture

    @cached_property
    def candidate(self) -> Capture:
        """The candidate's capture, fed the reference's tokens."""
        return self._ran or self._run_forced(self._progress)

    @contextmanager
    def _meanwhile(self) -> Iterator[None]:
        """The candidate runs while the context does what needs the reference's process, where both have cores.

        Raises EngineError if the candidate did not run.
        """
        if not (self._together and self._beside and isinstance(self._candidate, ProcessEngine)):
            yield
            return
        _ = self.reference
        self._opened_candidate()
        with ThreadPoolExecutor(1) as pool:
            ran = pool.submit(self._run_both)
            try:
                yield
            except BaseException:
                self._candidate.host.interrupt()
                raise
            self._say(f"waiting for {getattr(self._candidate, 'name', 'candidate')}")
        self._ran, self._free = ran.result()

    def _run_both(self) -> tuple[Capture, dict[str, list[int]] | None]:
        """The runs that need nothing but the truth's tokens, without a word: another speaks meanwhile."""
        return self._run_forced(None), self._run_free(None) if self._frees else None

    def _run_forced(self, progress: Progress | None) -> Capture:
        forced = [c.force(self.reference.continuation(c.id)) for c in self._cases]
        return self._run(forced, "candidate", points=None, progress=progress)

    def _run_free(self, progress: Progress | None) -> dict[str, list[int]]:
        capture = self._run(self._cases, "free", points=[], progress=progress)
        return {c.id: capture.generated(c.id) for c in self._cases}

    @property
    def chosen_freely(self) -> dict[str, list[int]] | None:
        """What ``free_tokens`` found, if it was asked for."""
        return self._free

    def free_tokens(self) -> dict[str, list[int]]:
        """What the candidate chooses when left alone, by case id; runs it once more, without recording."""
        if self._free is None:
            self._free = self._run_free(self._progress)
        return self._free

    @cached_property
    def subject(self) -> Subject:
        """What checks look at. Raises UsageError for a rule of the user's that fits nothing."""
        with self._meanwhile():
            twin = self._reference.twin_capture
        mapping = build_mapping(self.reference.manifest, self.candidate.manifest, user=self._rules)
        self._reference.cache = small_cache(self.candidate.manifest)
        return Subject(
            reference=self.reference,
            candidate=self.candidate,
            mapping=mapping,
            tolerance=self._tolerance,
            tolerance_source=self.config.source("tolerance"),
            free=self.free_tokens,
            twin=twin,
            no_floor=self._reference.no_floor,
            policies=self._policies,
            ensemble=self._reference.ensemble,
            replayed=self._explain and "replay" in self._opened_candidate().capabilities,
        )

    @cached_property
    def model(self) -> ModelSubject:
        """The model as a whole, as model checks look at it."""
        return ModelSubject(weights=self._weights, audit=self._audit)

    def results(self, checks: Iterable[str], *, command: list[str] | None = None) -> Results:
        """Run ``checks``, those of the model first, the others over all cases, and put the records together."""
        started = time.monotonic()
        names = list(checks)
        loaded = [CHECKS.get(name) for name in names]
        cased = [c.name for c in loaded if isinstance(c, Check)]
        if cased:
            self._begin()
        self._frees = "tokens" in names
        subject = self.subject if cased else None
        answers = [self.answer(c) for c in loaded if isinstance(c, ModelCheck)]
        answers += [self.examine(c) for c in loaded if isinstance(c, ReferenceCheck)]
        answers += [self.vary(c) for c in loaded if isinstance(c, InvarianceCheck)]
        coverage, findings = run_checks(subject, cased, progress=self._progress) if subject else ([], [])
        found = self.explained([f for a in answers for f in a.findings] + findings)
        run = self.run_record(names, command=command)
        return assemble(
            run,
            coverage=[a.coverage for a in answers] + coverage,
            findings=found,
            weights=[w for a in answers for w in a.weights],
            cases=case_infos(subject, free=self._free) if subject else [],
            config=self.config,
            seconds=time.monotonic() - started,
            notes=self.told(),
        )

    def explained(self, findings: list[Finding]) -> list[Finding]:
        """``findings`` with a verdict behind expert flips; where they fail with local errors and causes, if wanted."""
        compared = "subject" in self.__dict__
        if compared:
            findings = self._reruns.look(findings, explain=self._explain, local=self._local)
        if not self._explain or not any(f.verdict == "fail" for f in findings):
            return findings
        subject = self.subject if compared else None
        return self._attempt(
            "the diagnosis",
            lambda: explain_findings(findings, subject=subject, checkpoint=self._checkpoint, ask=self._edited),
            findings,
        )

    def _edited(self, question: Question) -> list[EditFound]:
        """What edits of the reference's code make of it; nothing where the reference is no model of transformers."""
        truth, none = self._reference.truth.engine, list[EditFound]()
        if not isinstance(truth, ProcessEngine) or truth.name != "hf" or self._checkpoint is None:
            return none
        if EDITED * self._checkpoint.size > free_memory():
            self.notes.append(
                "the reference's code was not edited to find the cause: memory is too short for its model"
            )
            return none
        arguments = truth.arguments | {"question": msgspec.to_builtins(question)}
        compute = partial(self._reference.compute, SEARCH, arguments, kind=list[EditFound])
        return self._attempt("the search for edits", compute, none)

    def _attempt(self, what: str, make: Callable[[], T], instead: T) -> T:
        return attempt(what, make, instead, notes=self.notes)

    def told(self) -> list[str]:
        """What the verdict does not speak of: what failed by itself, and what was asked for and never ran."""
        if "subject" not in self.__dict__:
            return self.notes
        config = self._checkpoint.text_config if self._checkpoint else {}
        ran = Ran(self.candidate.manifest.side, config, self._cases, self._idle)
        reason = self._reference.no_ensemble
        floor = [f"no rounding was drawn anew, the twin alone is the floor: {reason}"] if reason else []
        return [*notes_of(ran), *self.notes, *floor]

    @cached_property
    def _idle(self) -> dict[str, tuple[int, int]]:
        none: dict[str, tuple[int, int]] = {}
        return self._attempt("counting experts", lambda: idle_experts(self.reference), none)

    @cached_property
    def _reruns(self) -> Reruns:
        return Reruns(
            self.subject,
            self._opened_candidate,
            folder=Path(self._folder.name),
            notes=self.notes,
            draw=self._reference.draw_fed,
            progress=self._progress,
        )

    def answer(self, check: ModelCheck) -> Answer:
        """What a model check finds; that it was skipped, where there is not what it needs."""
        reason = self._lacks(check)
        if reason:
            skipped = [Unmatched(side="candidate", point=check.name, reason=reason)]
            return Answer(coverage=Coverage(check=check.name, points=0, compared=0, skipped=skipped), findings=[])
        self._say(f"checking: {check.name}")
        failed = Answer(coverage=Coverage(check=check.name, points=0, compared=0), findings=[])
        answer = self._attempt(f"check {check.name}", lambda: check.run(self.model), failed)
        if answer is not failed:
            return answer
        skipped = [Unmatched(side="candidate", point=check.name, reason=self.notes[-1])]
        return msgspec.structs.replace(answer, coverage=msgspec.structs.replace(answer.coverage, skipped=skipped))

    def examine(self, check: ReferenceCheck) -> Answer:
        """What a check of the reference alone finds."""
        self._say(f"checking: {check.name}")
        twin = self._reference.twin_capture
        subject = ReferenceSubject(
            truth=self.reference,
            twin=twin,
            variants=self._reference.run_variants,
            no_floor=self._reference.no_floor,
        )
        return check.run(subject)

    @cached_property
    def laboratory(self) -> Laboratory:
        """The candidate, to be run in several ways on the session's cases."""
        return self._laboratory(self._cases, Path(self._folder.name))

    def vary(self, check: InvarianceCheck, cases: list[Case] | None = None, *, located: bool = True) -> Answer:
        """What a check of invariance finds, on the session's cases or on others, whose captures are not kept.

        Of others only the logits are looked at, up to the first run that differs; then, if it is to be ``located``,
        all points of all runs.
        """
        self._say(f"checking: {check.name}")
        if cases is None:
            answer = check.run(self.laboratory)
            beside = [f for c in self.reference.cases for f in check.beside(self.subject, c)] if check.beside else []
            return add_findings(answer, beside)
        with self.bench(cases, points=check.looks) as laboratory:
            quick = check.run(laboratory)
        if not located or all(f.verdict == "pass" for f in quick.findings):
            return quick
        with self.bench(cases) as laboratory:
            return check.run(laboratory)

    @contextmanager
    def bench(
        self, cases: list[Case], *, points: tuple[str, ...] | None = None, thorough: bool = True
    ) -> Iterator[Laboratory]:
        """The candidate, to be run in several ways on ``cases``; what it gives is removed on leaving the context."""
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            yield self._laboratory(cases, Path(folder), points=points, thorough=thorough)

    def _laboratory(
        self, cases: list[Case], folder: Path, *, points: tuple[str, ...] | None = None, thorough: bool = True
    ) -> Laboratory:
        return Laboratory(
            own=self._opened_candidate,
            pool=self._pool,
            reference=lambda: self.reference.manifest,
            cases=cases,
            folder=folder,
            points=points,
            thorough=thorough,
            weights=lambda engine: judge_weights(self._weight_subject(engine)),
            progress=self._progress,
        )

    @property
    def candidate_args(self) -> dict[str, str]:
        """How the candidate runs; it is started on first need."""
        return self._opened_candidate().describe().args

    @property
    def starts(self) -> dict[str, int]:
        """How often each engine was started: the reference, the candidate, and this with other arguments, by these."""
        return {**self._reference.starts, **self._starts, **({} if self._pool is None else self._pool.starts)}

    def _lacks(self, check: ModelCheck) -> str:
        """Why a model check has nothing to look at; empty where it has."""
        if not check.needs:
            return "" if self._checkpoint is not None else "there is no checkpoint folder to read"
        engine = self._opened_candidate()
        if check.needs in engine.capabilities:
            return ""
        return f"engine {getattr(engine, 'name', 'candidate')!r} does not say where its loader puts weights"

    def run_record(self, checks: list[str], *, command: list[str] | None = None) -> Run:
        """The first record. Where no case ran, the reference is the checkpoint itself."""
        captured = "reference" in self.__dict__
        side = self.reference.manifest.side if captured else checkpoint_side(self._checkpoint)
        return run_record(side, self._candidate_side(checks), checks, command=command, starts=self.starts)

    def _candidate_side(self, checks: list[str]) -> Side:
        if "candidate" in self.__dict__:
            return self.candidate.manifest.side
        alone = bool(checks) and all(isinstance(CHECKS.get(name), ReferenceCheck) for name in checks)
        twin = self._reference.twin_capture if alone else None
        return twin.manifest.side if twin is not None else self._opened_candidate().describe()

    def _weights(self) -> WeightSubject:
        """The candidate's ledgers beside what the checkpoint and the reference let expect."""
        return self._weight_subject(self._opened_candidate())

    def _weight_subject(self, engine: Any) -> WeightSubject:
        ledgers: list[RankLedger] = engine.ledger()
        dtype = engine.describe().dtype
        return weight_subject(
            ledgers, self._checkpoint, dtype=dtype, allowed=self._allowed, compute=self._reference.compute
        )

    def _audit(self) -> Audit:
        assert self._checkpoint is not None
        ranks = self._opened_candidate().describe().parallel.get("tensor_parallel_size", 1)
        arguments = {"folder": str(self._checkpoint.path), "tensor_parallel_size": ranks}
        found: Audit = self._reference.compute("paritykit.audit.run:audit", arguments, kind=Audit)
        return found

    def _begin(self) -> None:
        """Let the candidate's process start beside the reference, where it has one of its own and that is wanted."""
        if isinstance(self._candidate, ProcessEngine) and self._together and not self._opened:
            self._candidate.begin()

    def _opened_candidate(self) -> Engine:
        if not self._opened:
            self._opened = True
            self._say(f"starting {getattr(self._candidate, 'name', 'candidate')}")
            self._candidate.open()
            self._starts["candidate"] = 1
        return self._candidate

    def _run(self, cases: list[Case], name: str, *, points: list[str] | None, progress: Progress | None) -> Capture:
        out = Path(self._folder.name) / name
        return self._opened_candidate().run(cases, points=Selection(points), out=out, progress=progress)

    def _say(self, what: str) -> None:
        if self._progress:
            self._progress(what, 0, 0)
