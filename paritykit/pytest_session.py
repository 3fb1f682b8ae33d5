"""What stands behind the pytest fixtures: one session for each model, and the records that tests leave."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from paritykit.case import Case, CaseSet
from paritykit.checks import CHECKS
from paritykit.checks.base import Answer, InvarianceCheck, ModelCheck, ReferenceCheck, Subject
from paritykit.engines.process import HostPool
from paritykit.errors import ParityError, ParityFailure, UnknownNameError, UsageError
from paritykit.exploration import Exploration, explore
from paritykit.invariance.explore import find_profile
from paritykit.meanings import settle
from paritykit.models import cases_for
from paritykit.options import parse_engine_args
from paritykit.plan import Plan, make_plan
from paritykit.records import assemble, case_infos, merge_results
from paritykit.reports import write_report
from paritykit.reports.failure import failure_text
from paritykit.reports.wording import SIDES, starts
from paritykit.repro import command_of
from paritykit.results import CaseInfo, Coverage, Finding, Results, WeightRow, read_jsonl, write_jsonl
from paritykit.session import Session

T = TypeVar("T")


@contextmanager
def told_briefly() -> Iterator[None]:
    """In a fixture: an error raised on purpose becomes its message, without frames that are not the user's."""
    try:
        yield
    except ParityError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def plan_from_options(
    model: str, option: Callable[[str], Any], *, cases: Iterable[CaseSet], candidate: str | None = None
) -> Plan:
    """The plan for a model from pytest's options, over all ``cases`` together. Raises UsageError."""
    given = {n: option("--parity-" + n.replace("_", "-")) for n in ("reference", "dtype", "reference_dtype")}
    given["candidate"] = candidate
    sets = list(cases)
    return make_plan(
        model,
        given=given,
        case_names=list(dict.fromkeys(name for s in sets for name in s.names)),
        fixed=dict.fromkeys(case for s in sets for case in s.fixed),
        engine_args=parse_engine_args(option("--parity-engine-arg")),
        tensor_parallel_size=option("--parity-tensor-parallel-size"),
        map_file=option("--parity-map"),
        explain=not option("--parity-no-explain"),
        local=option("--parity-local"),
    )


class ParitySession:
    """Engines and captures of one model, shared by its tests; findings are kept for the report.

    ``command`` shows them again where ``paritykit run`` does not: the engines are the user's own, and cannot be started
    again with other arguments. ``profile`` says how long to look for workloads.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        reference: Any,
        candidate: Any,
        hosts: HostPool,
        profile: str | None = None,
        command: list[str] | None = None,
    ) -> None:
        """``reference`` is an engine of the user's own, or the plan's reference."""
        self._plan = plan
        self._profile = find_profile(profile or "ci")
        self._command = command
        self._session = Session(
            reference=reference,
            candidate=candidate,
            cases=plan.resolve_cases(),
            config=plan.config,
            checkpoint=plan.checkpoint,
            rules=plan.rules,
            vary=None if command else partial(plan.varied_engine, hosts=hosts),
            explain=plan.explain,
            local=plan.local,
        )
        self._held: dict[str, Exploration] = {}
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
        findings = self._session.explained(settle(subject, check.run(subject, case)))
        return self._keep(name, Answer(coverage=check.cover(subject), findings=findings))

    def hold(self, name: str, cases: CaseSet) -> Results:
        """Run a check of invariance on cases of its own; of one check the report shows the last workload that failed.

        Raises UsageError for another check, or cases that do not fit the model.
        """
        check = _invariance(name)
        resolved = cases_for(self._plan.checkpoint, cases)
        answer = self._tried(lambda: self._session.vary(check, resolved))
        failed = any(f.verdict == "fail" for f in answer.findings)
        return self._hold(name, Exploration(answer=answer, failing=resolved if failed else [], tried=1))

    def explore(self, name: str) -> Results:
        """Run a check of invariance on drawn workloads. Raises UsageError for another check."""
        check = _invariance(name)
        found = self._tried(
            lambda: explore(self._session, check, checkpoint=self._plan.checkpoint, profile=self._profile)
        )
        return self._hold(name, found)

    def finish(self, parts: Path) -> None:
        """Close the engines and leave what was found in the folder of parts."""
        try:
            held = [h.answer for h in self._held.values()]
            coverage = [*self._coverage.values(), *(a.coverage for a in held)]
            if coverage:
                parts.mkdir(mode=0o700, exist_ok=True)
                findings = self._findings + [f for a in held for f in a.findings]
                cases = [_case_info(c) for h in self._held.values() for c in h.failing]
                names = list(dict.fromkeys([*self._coverage, *self._held]))
                whole = self._assemble(names, coverage, findings, self._weights, cases=cases)
                write_jsonl(whole, parts / f"{uuid.uuid4().hex}.jsonl")
        finally:
            self._session.close()

    def _hold(self, name: str, found: Exploration) -> Results:
        ids = [c.id for c in found.failing]
        named = [msgspec.structs.replace(f, workload=ids) for f in found.answer.findings]
        answer = msgspec.structs.replace(found.answer, findings=named)
        held = self._held.get(name)
        if held is None or found.failing or not held.failing:
            self._held[name] = msgspec.structs.replace(found, answer=answer)
        return self._assemble([name], [answer.coverage], named, [], cases=map(_case_info, found.failing))

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
        checks: list[str],
        coverage: list[Coverage],
        findings: list[Finding],
        weights: list[WeightRow],
        *,
        cases: Iterable[CaseInfo] = (),
    ) -> Results:
        """``cases`` are those beside the session's own."""
        command = self._command or command_of(self._plan, cases=self._plan.case_names)
        run = self._session.run_record(checks, command=command)
        infos = case_infos(self._subject, free=self._session.chosen_freely) if self._subject else []
        return assemble(
            run,
            coverage=coverage,
            findings=findings,
            weights=weights,
            cases=list({c.id: c for c in (*infos, *cases)}.values()),
            config=self._plan.config,
            notes=self._session.told(),
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
        return _any_compared(told(lambda: self._session.hold(name, workload)))

    def explore(self, name: str) -> Results:
        """Hold the candidate against itself on workloads drawn for its blocks and the model's window.

        Returns the records if check ``name`` passes on all; raises ParityFailure for the smallest workload that fails.
        ``--parity-profile`` says how long to look. Needs Hypothesis. The test is skipped where the engine cannot do
        what is asked.
        """
        __tracebackhide__ = True
        results = told(lambda: self._session.explore(name))
        self._item.user_properties += properties(results)
        return _any_compared(results)


def _invariance(name: str) -> InvarianceCheck:
    check = CHECKS.get(name)
    if not isinstance(check, InvarianceCheck):
        raise UsageError(f"check {name!r} does not hold an engine against itself; use parity.check")
    return check


def _case_info(case: Case) -> CaseInfo:
    return CaseInfo(id=case.id, tokens=list(case.tokens), new_tokens=case.new_tokens, batch=case.batch)


def told(attempt: Callable[[], Results]) -> Results:
    """What ``attempt`` gives; an error raised on purpose comes without frames that are not the user's."""
    __tracebackhide__ = True
    try:
        return attempt()
    except ParityError as error:
        raise error.with_traceback(None) from None


def _any_compared(results: Results) -> Results:
    """``results`` if they pass, or if there was nothing to tell apart; skips where the engine cannot be run so."""
    __tracebackhide__ = True
    if results.findings:
        return passed(results)
    reasons = [u.reason for c in results.coverage for u in c.skipped]
    if reasons:
        pytest.skip(reasons[0])
    return results


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
        started = f", {starts(results)}" if len(results.run.starts) > SIDES else ""
        lines.append(
            f"{summary.verdict.upper():<13}{name}: {summary.compared} compared, {summary.failed} failed{started}"
        )
        lines += [f"{'':13}note: {note}" for note in summary.notes]
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
