"""What stands behind the pytest fixtures: one session for each model, and the records that tests leave."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from paritykit.case import CaseSet
from paritykit.checks import CHECKS
from paritykit.checks.base import Answer, InvarianceCheck, ModelCheck, ReferenceCheck, Subject
from paritykit.errors import ParityError, ParityFailure, UnknownNameError, UsageError
from paritykit.options import parse_engine_args
from paritykit.plan import Plan, make_plan
from paritykit.records import assemble, case_infos, merge_results
from paritykit.reports import write_report
from paritykit.reports.failure import failure_text
from paritykit.results import Coverage, Finding, Results, WeightRow, read_jsonl, write_jsonl
from paritykit.runner import Session

T = TypeVar("T")


@contextmanager
def told_briefly() -> Iterator[None]:
    """In a fixture: an error raised on purpose becomes its message, without frames that are not the user's."""
    try:
        yield
    except ParityError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def plan_from_options(model: str, option: Callable[[str], Any], *, cases: Iterable[CaseSet]) -> Plan:
    """The plan for a model from pytest's options, over all ``cases`` together. Raises UsageError."""
    given = {
        n: option("--parity-" + n.replace("_", "-")) for n in ("reference", "candidate", "dtype", "reference_dtype")
    }
    sets = list(cases)
    return make_plan(
        model,
        given=given,
        case_names=list(dict.fromkeys(name for s in sets for name in s.names)),
        fixed=dict.fromkeys(case for s in sets for case in s.fixed),
        engine_args=parse_engine_args(option("--parity-engine-arg")),
        tensor_parallel_size=option("--parity-tensor-parallel-size"),
        map_file=option("--parity-map"),
    )


class ParitySession:
    """Engines and captures of one model, shared by its tests; findings are kept for the report.

    ``command`` shows them again where ``paritykit run`` does not.
    """

    def __init__(self, plan: Plan, *, reference: Any, candidate: Any, command: list[str] | None = None) -> None:
        """``reference`` is an engine of the user's own, or the plan's reference."""
        self._plan = plan
        self._given, self._command = command, command or _command(plan, plan.case_names)
        self._session = Session(
            reference=reference,
            candidate=candidate,
            cases=plan.resolve_cases(),
            config=plan.config,
            checkpoint=plan.checkpoint,
            rules=plan.rules,
            vary=plan.varied_engine,
        )
        self._coverage: dict[str, Coverage] = {}
        self._findings: list[Finding] = []
        self._weights: list[WeightRow] = []
        self._subject: Subject | None = None
        self._error: ParityError | None = None

    def check(self, name: str, case: str = "") -> Results:
        """Run one check, on one case unless it looks at the model as a whole.

        Raises UnknownNameError for a check or a case that is not there, EngineError if an engine could not run.
        """
        check = CHECKS.get(name)
        if isinstance(check, ModelCheck):
            return self._keep(name, self._tried(lambda: self._session.answer(check)))
        if isinstance(check, InvarianceCheck):
            return self._keep(name, self._tried(lambda: self._session.vary(check)))
        if isinstance(check, ReferenceCheck):
            return self._keep(name, self._tried(lambda: self._session.examine(check)))
        subject = self._tried(lambda: self._session.subject)
        if case not in subject.reference.cases:
            raise UnknownNameError("case (mark the test with paritykit.cases)", case, subject.reference.cases)
        self._subject = subject
        return self._keep(name, Answer(coverage=check.cover(subject), findings=check.run(subject, case)))

    def hold(self, name: str, cases: CaseSet) -> Results:
        """Run a check of invariance on cases of its own; nothing is kept for the report but a failure.

        Raises UsageError for another check, or cases that do not fit the model.
        """
        check = CHECKS.get(name)
        if not isinstance(check, InvarianceCheck):
            raise UsageError(f"check {name!r} does not hold an engine against itself; use parity.check")
        found = self._plan.checkpoint
        resolved = cases.resolve(vocab_size=found.vocab_size, max_positions=found.max_positions)
        answer = self._tried(lambda: self._session.vary(check, resolved))
        command = self._given or _command(self._plan, cases.ids())
        return self._assemble([name], [answer.coverage], answer.findings, [], command=command)

    def finish(self, parts: Path) -> None:
        """Close the engines and leave what was found in the folder of parts."""
        try:
            if self._coverage:
                parts.mkdir(mode=0o700, exist_ok=True)
                coverage = list(self._coverage.values())
                whole = self._assemble(list(self._coverage), coverage, self._findings, self._weights)
                write_jsonl(whole, parts / f"{uuid.uuid4().hex}.jsonl")
        finally:
            self._session.close()

    def _tried(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` gives; engines that failed once are not tried again by every test."""
        if self._error is not None:
            raise self._error
        try:
            return attempt()
        except ParityError as error:
            self._error = error
            raise

    def _keep(self, name: str, answer: Answer) -> Results:
        self._coverage[name] = answer.coverage
        self._findings += answer.findings
        self._weights += answer.weights
        return self._assemble([name], [answer.coverage], answer.findings, answer.weights)

    def _assemble(
        self,
        names: list[str],
        coverage: list[Coverage],
        findings: list[Finding],
        weights: list[WeightRow],
        *,
        command: list[str] | None = None,
    ) -> Results:
        return assemble(
            self._session.run_record(names, command=command or self._command),
            coverage=coverage,
            findings=findings,
            weights=weights,
            cases=case_infos(self._subject, free=self._session.chosen_freely) if self._subject else [],
            config=self._plan.config,
        )


class Parity:
    """The fixture ``parity`` of one test."""

    def __init__(self, session: ParitySession, item: pytest.Item) -> None:
        self._session = session
        self._item = item

    def check(self, name: str, case: str = "") -> Results:
        """Returns the records if the check passes; raises ParityFailure otherwise. Model checks take no ``case``.

        Too little compared is no pass. The test is skipped, and says so, where the check has nothing to look at.
        """
        __tracebackhide__ = True
        results = told(lambda: self._session.check(name, case))
        self._item.user_properties += properties(results)
        if not results.findings:
            reason = next((u.reason for c in results.coverage for u in c.skipped if not case), "")
            pytest.skip(reason or f"check {name!r} has nothing to compare in case {case!r}")
        return passed(results)

    def hold(self, name: str, workload: CaseSet) -> Results:
        """Hold the candidate against itself on a workload: check ``name`` (batching, chunking, ...) on these cases.

        Returns the records if it passes; raises ParityFailure otherwise. Made for Hypothesis: engines are shared, and a
        workload too small to be run in two ways passes. The test is skipped where the engine cannot do what is asked.
        """
        __tracebackhide__ = True
        results = told(lambda: self._session.hold(name, workload))
        if not results.findings:
            reasons = [u.reason for c in results.coverage for u in c.skipped]
            if reasons:
                pytest.skip(reasons[0])
            return results
        return passed(results)


def told(attempt: Callable[[], Results]) -> Results:
    """What ``attempt`` gives; an error raised on purpose comes without frames that are not the user's."""
    __tracebackhide__ = True
    try:
        return attempt()
    except ParityError as error:
        raise error.with_traceback(None) from None


def passed(results: Results) -> Results:
    """``results`` if they pass. Raises ParityFailure."""
    __tracebackhide__ = True
    if results.summary.verdict != "pass":
        raise ParityFailure(failure_text(results))
    return results


def properties(results: Results) -> list[tuple[str, object]]:
    """What JUnit shows of a parity test."""
    first = results.summary.first_divergence
    worst = max((f.value or 0.0 for f in results.findings), default=0.0)
    return [
        ("parity_verdict", results.summary.verdict),
        ("parity_first_divergence", first.point if first else ""),
        ("parity_worst", worst),
    ]


def merge_parts(folder: Path, wanted: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """Merge the parts of each model, write the reports asked for.

    Returns lines for the terminal, a report's path under its model's verdict, and the reports that were not written.
    """
    by_model: dict[tuple[str, str], list[Results]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        part = read_jsonl(path)
        by_model.setdefault((part.run.reference.model, part.run.candidate.engine), []).append(part)
    lines: list[str] = []
    errors: list[str] = []
    names = _distinct(by_model)
    for key, found in by_model.items():
        results, name = merge_results(found), names[key]
        summary = results.summary
        lines.append(f"{summary.verdict.upper():<13}{name}: {summary.compared} compared, {summary.failed} failed")
        for kind, target in wanted.items():
            if target:
                path = Path(target) if len(by_model) == 1 else _beside(Path(target), name)
                (errors if (said := _write(results, kind, path)) else lines).append(said or f"{'':13}{path}")
    return lines, errors


def _distinct(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A name for each model and candidate: the folder's, with the engine or a number where that is not enough."""
    found: dict[tuple[str, str], str] = {}
    for model, engine in keys:
        name = Path(model).name
        choices = [name, f"{name}-{engine}", *(f"{name}-{engine}-{n}" for n in range(2, len(found) + 3))]
        found[model, engine] = next(c for c in choices if c not in found.values())
    return found


def _write(results: Results, kind: str, path: Path) -> str:
    """Write one report; what went wrong, empty if nothing did: the other reports are still wanted."""
    try:
        write_report(results, format=kind, path=path)
    except UsageError as error:
        return str(error)
    return ""


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def _command(plan: Plan, cases: Iterable[str]) -> list[str]:
    words = ["paritykit", "run", plan.model, "--candidate", str(plan.config["candidate"])]
    words += ["--dtype", str(plan.config["dtype"])]
    if plan.tensor_parallel_size != 1:
        words += ["--tensor-parallel-size", str(plan.tensor_parallel_size)]
    for key, value in plan.engine_args.items():
        words += ["--engine-arg", f"{key}={value}"]
    return words + [word for name in cases for word in ("--case", name)]
