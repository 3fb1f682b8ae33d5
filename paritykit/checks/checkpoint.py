"""Check ``checkpoint``: do the files and the config say one thing, to every engine?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paritykit.checks.base import Answer, ModelCheck, ModelSubject
from paritykit.results import Coverage, Finding, Unmatched

if TYPE_CHECKING:
    from paritykit.audit.notice import Audit, Notice

NAME = "checkpoint"


def run(subject: ModelSubject) -> Answer:
    """The findings of the audit."""
    return answer_of(subject.audit)


def answer_of(audit: Audit) -> Answer:
    """A failing finding for every error, a skipped one for every warning, one that passes where there is neither."""
    findings = [_finding(n, order) for order, n in enumerate([*audit.errors, *audit.warnings])]
    if not audit.errors:
        text = f"{len(audit.files)} weight files, {audit.tensors} tensors, {len(audit.notices)} notices, none an error"
        findings.append(Finding(check=NAME, case="", point="files and config", verdict="pass", message=text))
    skipped = [Unmatched(side="reference", point=n.place, reason=f"{n.code}: {n.message}") for n in audit.warnings]
    points = len(audit.files) + audit.tensors
    return Answer(
        coverage=Coverage(check=NAME, points=points, compared=points, skipped=skipped),
        findings=findings,
    )


def _finding(notice: Notice, order: int) -> Finding:
    return Finding(
        check=NAME,
        case="",
        point=notice.place,
        verdict="fail" if notice.severity == "error" else "skip",
        metric=notice.code,
        origin="introduced" if notice.severity == "error" else None,
        order=order,
        message=f"{notice.message} HF: {notice.hf} vLLM: {notice.vllm} Next: {notice.fix}",
    )


CHECK = ModelCheck(
    name=NAME,
    question="do the checkpoint's files and config say one thing, to every engine?",
    run=run,
    detects=("nonfinite", "missing-tensor", "truncated-file", "tie-mismatch"),
)
