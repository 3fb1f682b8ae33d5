"""What two captures, a ledger or an audit come to: checks, further runs, causes, and the records put together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from paritykit.audit import Audit
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.checks import CHECKS
from paritykit.checks.base import Check, Subject
from paritykit.checks.checkpoint import answer_of
from paritykit.comparison.ensemble import Draw, Ensemble
from paritykit.comparison.policy import Policy, read_policies
from paritykit.comparison.tolerance import check_overrides
from paritykit.config import Config, load_config
from paritykit.engines.base import Engine, Progress
from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import UsageError
from paritykit.ledger.expect import expect
from paritykit.ledger.judge import judge_weights, lost_tensors
from paritykit.ledger.subject import Allowed, ReferenceLayout, WeightSubject
from paritykit.mapping.build import build_mapping
from paritykit.mapping.user import UserRule
from paritykit.meanings import settle
from paritykit.notes import attempt
from paritykit.provenance.weightmap import RankLedger
from paritykit.records import assemble, case_infos, checkpoint_side, explain_findings, run_record
from paritykit.registry import call_function
from paritykit.reruns import Reruns
from paritykit.results import Coverage, Finding, Results, Side

LAYOUT = "paritykit.engines.layout:reference_layout"
UNUSED = "paritykit.engines.unused:unused_tensors"


class Compute(Protocol):
    """Calls ``package.module:function`` and gives what it does, which is of type ``kind``."""

    def __call__(self, target: str, arguments: Mapping[str, Any], *, kind: Any) -> Any:
        """``arguments`` and the result are what JSON can hold."""


def run_checks(
    subject: Subject, checks: Iterable[str], *, progress: Progress | None = None
) -> tuple[list[Coverage], list[Finding]]:
    """Coverage and findings of ``checks`` over every case of the subject. UnknownNameError for an unknown check."""
    loaded = [case_check(name) for name in checks]
    todo = [(check, case) for check in loaded for case in subject.reference.cases]
    findings: list[Finding] = []
    for number, (check, case) in enumerate(todo):
        if progress:
            progress(f"comparing: {check.name}", number, len(todo))
        findings += check.run(subject, case)
    findings = settle(subject, findings)
    return [check.cover(subject) for check in loaded], findings


def case_check(name: str) -> Check:
    """The check of that name that compares captures. UnknownNameError for none, UsageError for a model check."""
    found = CHECKS.get(name)
    if not isinstance(found, Check):
        raise UsageError(f"check {name!r} looks at a loaded engine, not at captures; see `paritykit run`")
    return found


def case_checks() -> list[str]:
    """Names of the checks that compare captures."""
    return [name for name, check in CHECKS.items() if isinstance(check, Check)]


def weight_subject(
    ledgers: list[RankLedger],
    checkpoint: Checkpoint | None,
    *,
    dtype: str,
    allowed: list[Allowed] | None = None,
    compute: Compute | None = None,
) -> WeightSubject:
    """What the ledger looks at; where there is no checkpoint to read, the tensors are those the loader was handed.

    ``compute`` calls a function by its name, where transformers is imported: see ``Reference.compute``.
    """
    asked = compute or _called
    tensors = {n: (tuple(s), checkpoint.dtypes[n]) for n, s in checkpoint.tensors.items()} if checkpoint else {}
    tensors = tensors or {n: (t.shape, t.dtype) for r in ledgers for n, t in r.found.tensors.items()}
    folder = {"folder": str(checkpoint.path)} if checkpoint else {}
    layout = asked(LAYOUT, folder, kind=ReferenceLayout | None) if checkpoint else None
    expected = expect(tensors, ledgers=ledgers, reference=layout, dtype=dtype, allowed=allowed)
    subject = WeightSubject(ledgers, expected)
    lost = lost_tensors(subject)
    if layout is None or not lost:
        return subject
    unused = asked(UNUSED, folder | {"tensors": lost, "parameters": layout.parameters}, kind=list[str])
    used = {tensor: parameter for tensor, parameter in layout.parameters.items() if tensor not in unused}
    layout = msgspec.structs.replace(layout, parameters=used)
    return WeightSubject(ledgers, msgspec.structs.replace(expected, reference=layout))


def _called(target: str, arguments: Mapping[str, Any], *, kind: Any) -> Any:
    """See ``Compute``: in this process."""
    del kind
    return call_function(target, arguments)


def weight_results(ledgers: list[RankLedger], side: Side, checkpoint: Checkpoint | None) -> Results:
    """The records of check ``weights`` alone, for an engine that is described by ``side``."""
    judged = judge_weights(weight_subject(ledgers, checkpoint, dtype=side.dtype))
    return assemble(
        run_record(checkpoint_side(checkpoint), side, ["weights"]),
        coverage=[judged.coverage],
        findings=explain_findings(judged.findings, subject=None),
        weights=judged.rows,
        cases=[],
        config=load_config(),
    )


def audit_results(found: Audit, model: str, *, command: list[str] | None = None) -> Results:
    """The records of check ``checkpoint`` alone, for a folder that need not be whole."""
    answer = answer_of(found)
    side = Side(engine="checkpoint", model=model, dtype="as stored")
    return assemble(
        run_record(side, side, ["checkpoint"], command=command),
        coverage=[answer.coverage],
        findings=explain_findings(answer.findings, subject=None),
        cases=[],
        config=load_config(),
    )


def policies_of(config: Config) -> list[Policy]:
    """The project's own allowed numbers. Raises UsageError for one that makes no sense."""
    return read_policies(config["policy"], source=config.source("policy"), checks=CHECKS.names())


def compare_captures(
    reference: Capture,
    candidate: Capture,
    *,
    twin: Capture | None = None,
    ensemble: Ensemble | None = None,
    draw: Draw | None = None,
    checks: Iterable[str] | None = None,
    config: Config | None = None,
    rules: list[UserRule] | None = None,
    command: list[str] | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
    explain: bool = True,
    local: bool | None = None,
) -> Results:
    """Compare two captures from disk. ``tokens`` sees only what the candidate chose while it was fed.

    ``twin`` is the reference in the candidate's dtype, fed the same tokens, for a noise floor, and ``ensemble`` what
    draws of its rounding do. ``engine`` is the candidate, opened to replay modules where a case fails (``draw``: beside
    draws that are fed so too) and, where there are draws, if none does: with ``local`` always or never. With
    ``explain`` causes are looked for. Raises UsageError if they do not hold the same tokens.
    """
    config = config or load_config()
    for other in (candidate, *([twin] if twin is not None else [])):
        check_same_tokens(reference, other)
    subject = Subject(
        reference=reference,
        candidate=candidate,
        mapping=build_mapping(reference.manifest, candidate.manifest, user=rules),
        tolerance=check_overrides(config["tolerance"]),
        tolerance_source=config.source("tolerance"),
        twin=twin,
        policies=policies_of(config),
        ensemble=ensemble,
        replayed=engine is not None and "replay" in engine.capabilities,
    )
    names = list(checks) if checks is not None else case_checks()
    coverage, findings = run_checks(subject, names, progress=progress)
    notes: list[str] = []
    if engine is not None:
        with _opened_late(engine) as opened, tempfile.TemporaryDirectory(prefix="paritykit-") as folder:
            reruns = Reruns(subject, opened, folder=Path(folder), notes=notes, draw=draw, progress=progress)
            findings = reruns.look(findings, explain=True, local=local)
    if explain:
        findings = attempt("the diagnosis", partial(explain_findings, findings, subject=subject), findings, notes=notes)
    run = run_record(reference.manifest.side, candidate.manifest.side, names, command=command)
    infos = case_infos(subject)
    return assemble(run, coverage=coverage, findings=findings, cases=infos, config=config, notes=notes)


@contextmanager
def _opened_late(engine: Engine) -> Iterator[Callable[[], Engine]]:
    """Gives the engine, opened when it is first asked for, and closes it on leaving the context."""
    opened: list[Engine] = []

    def open_once() -> Engine:
        if not opened:
            try:
                engine.open()
            except BaseException:
                engine.close()
                raise
            opened.append(engine)
        return engine

    try:
        yield open_once
    finally:
        for used in opened:
            used.close()


def check_same_tokens(reference: Capture, candidate: Capture) -> None:
    """Raise UsageError unless the candidate was given the reference's tokens, in every case and at every position."""
    for case in reference.cases.values():
        other = candidate.cases.get(case.id)
        if other is None:
            raise UsageError(f"{candidate.path} has no case {case.id!r}, which {reference.path} has")
        ours, theirs = fed_tokens(reference, case), fed_tokens(candidate, other)
        if ours != theirs:
            place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            hint = "" if place < len(case.tokens) else "; capture the candidate with --follow"
            raise UsageError(f"case {case.id!r}: the captures hold other tokens from position {place} on{hint}")


def fed_tokens(capture: Capture, case: Case) -> list[int]:
    """The tokens an engine computed positions for: the prompt, then what it was fed or fed itself."""
    return [*case.tokens, *capture.continuation(case.id)][: case.positions]
