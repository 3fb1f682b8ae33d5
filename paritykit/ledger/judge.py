"""From problems to records: a finding for every tensor and for every parameter that is wrong, and the rows to show."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import msgspec

from paritykit.ledger.coverage import lost
from paritykit.ledger.problem import Problem, on_rank, size_of
from paritykit.ledger.problems import find_problems
from paritykit.ledger.subject import WeightSubject
from paritykit.provenance.names import pattern
from paritykit.provenance.weightmap import Landing, show, size
from paritykit.results import Coverage, Finding, Unmatched, Verdict, WeightRow

CHECK = "weights"
RULE = "every element arrives once, unchanged"


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger, judged."""

    coverage: Coverage
    findings: list[Finding]
    rows: list[WeightRow]


def judge_weights(subject: WeightSubject) -> Judged:
    """Findings in the order of the checkpoint, then those of parameters; none where a rank was not traced."""
    if subject.errors:
        return _untraced(subject)
    by_name: dict[str, list[Problem]] = defaultdict(list)
    for problem in find_problems(subject):
        by_name[problem.name].append(problem)
    names = [*subject.expected.tensors, *(n for n in by_name if n not in subject.expected.tensors)]
    findings = [_finding(subject, n, by_name.get(n, []), order) for order, n in enumerate(names)]
    skipped = [Unmatched(side="reference", point=f.point, reason=f.message) for f in findings if f.verdict == "skip"]
    skipped += _buffers(subject)
    compared = sum(f.verdict != "skip" for f in findings)
    coverage = Coverage(check=CHECK, points=len(names), compared=compared, skipped=skipped)
    return Judged(coverage=coverage, findings=findings, rows=weight_rows(subject, findings))


def _buffers(subject: WeightSubject) -> list[Unmatched]:
    """Buffers that no tensor fills, those of all layers together."""
    unwritten = [g for g in subject.gaps if g.kind == "unwritten"]
    buffers = dict.fromkeys(g.parameter for g in unwritten if subject.parameters[g.parameter, g.rank].buffer)
    alike = Counter(map(pattern, buffers))
    reason = "made when the model is built, not loaded"
    return [Unmatched(side="candidate", point=n, reason=f"{count} buffers, {reason}") for n, count in alike.items()]


def _untraced(subject: WeightSubject) -> Judged:
    """No ledger is a check less, with its reason; what else a run compares stands."""
    skipped = [
        Unmatched(side="candidate", point=f"rank {rank}", reason=f"the loader was not traced: {why}")
        for rank, why in subject.errors.items()
    ]
    return Judged(coverage=Coverage(check=CHECK, points=0, compared=0, skipped=skipped), findings=[], rows=[])


def _finding(subject: WeightSubject, name: str, problems: list[Problem], order: int) -> Finding:
    landings = subject.by_tensor.get(name, [])
    reason = next((r for p in problems if (r := allowed_reason(subject, p))), "")
    place = subject.unfollowed.get(name)
    if place is not None:
        reason = f"an operation on its way into {place} was not followed, so its numbers were not compared"
    real = [p for p in problems if not allowed_reason(subject, p)]
    verdict: Verdict = "fail" if real else "skip" if place or (reason and not landings) else "pass"
    more = f" (and {len(real) - 1} more)" if len(real) > 1 else ""
    shape, dtype = subject.expected.tensors.get(name, ((), ""))
    dtypes = sorted({subject.parameters[x.parameter, x.rank].dtype for x in landings})
    return Finding(
        check=CHECK,
        case="",
        point=name,
        verdict=verdict,
        metric=real[0].code if real else "differing",
        value=float(sum(p.elements for p in real)) if real else 0.0,
        allowed=0.0,
        allowed_source=RULE,
        origin="introduced" if real else None,
        order=order,
        message=real[0].message + more if real else reason,
        candidate_point=", ".join(dict.fromkeys(x.parameter for x in landings)) or ("" if dtype else name),
        mapping="; ".join(landing_text(subject, x) for x in landings[:8]),
        metrics={p.code: float(p.elements) for p in real},
        shape=list(shape),
        dtypes=(dtype, dtypes[0]) if dtype and dtypes else None,
    )


def lost_tensors(subject: WeightSubject) -> list[str]:
    """Tensors that arrived nowhere, though nothing so far says that it is meant to be."""
    return [] if subject.errors else [p.name for p in lost(subject) if not allowed_reason(subject, p)]


def allowed_reason(subject: WeightSubject, problem: Problem) -> str:
    """Why a problem is meant to be; empty where it is not."""
    for rule in subject.expected.allowed:
        if rule.problem == problem.code and re.fullmatch(rule.name, problem.name):
            return rule.reason
    if problem.cancels:
        return problem.cancels
    layout = subject.expected.reference
    if layout is None or problem.code != "unread":
        return ""
    if problem.name == layout.head and layout.tied and problem.name not in subject.by_tensor:
        return "the config ties the output head to the embedding, so this tensor is not used"
    if problem.name not in layout.parameters:
        return "the reference does not use this tensor either"
    return ""


def landing_text(subject: WeightSubject, landing: Landing) -> str:
    """A landing in one line: from where to where."""
    shape = subject.parameters[landing.parameter, landing.rank].shape
    source = show(landing.source, subject.shape(landing.tensor))
    turned = " transposed" if landing.transposed else ""
    changed = f" as {landing.change}" if landing.change else ""
    return (
        f"{source} -> {landing.parameter}{show(landing.target, shape)}{turned}{changed}{on_rank(subject, landing.rank)}"
    )


def weight_rows(subject: WeightSubject, findings: list[Finding]) -> list[WeightRow]:
    """Every landing, every tensor that landed nowhere and every gap that is not padding, as rows for people."""
    verdicts = {f.point: f for f in findings}
    rows = []
    for name, (shape, dtype) in subject.expected.tensors.items():
        finding = verdicts[name]
        told = finding.message if finding.verdict != "pass" else ""
        status = finding.metric if finding.verdict == "fail" else finding.verdict
        for x in subject.by_tensor.get(name, []):
            target = subject.parameters[x.parameter, x.rank].shape
            rows.append(
                WeightRow(
                    tensor=name,
                    parameter=x.parameter,
                    rank=x.rank,
                    source=show(x.source, shape),
                    target=show(x.target, target),
                    change=", ".join(filter(None, ["transposed" if x.transposed else "", x.change])),
                    elements=size(x.source),
                    dtype=dtype,
                    status=status,
                    message=told,
                )
            )
        if name not in subject.by_tensor:
            rows.append(WeightRow(tensor=name, elements=size_of(shape), dtype=dtype, status=status, message=told))
    rows += [
        WeightRow(parameter=f.point, elements=int(f.value or 0), status=f.metric, message=f.message)
        for f in findings
        if f.point not in subject.expected.tensors
    ]
    return rows
