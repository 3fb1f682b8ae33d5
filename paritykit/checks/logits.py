"""Check ``logits``: is the distribution over the next token the same, at every position?"""

from __future__ import annotations

import msgspec
import torch

from paritykit.checks.base import LOGITS, Check, Subject
from paritykit.checks.measured import measure_point
from paritykit.comparison.align import pairs
from paritykit.comparison.logits import LogitMeasurement, measure_logits
from paritykit.mapping.rules import Rule
from paritykit.results import Coverage, Finding, Unmatched


def logits_rule(subject: Subject) -> Rule | None:
    """The rule that pairs both sides' logits; None where a side has none."""
    return next((r for r in subject.mapping.rules if r.reference == LOGITS), None)


def logits_pair(subject: Subject, rule: Rule, case: str) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Positions, and both sides' logits at them, ``[tokens, vocab]``."""
    parts = list(pairs(rule, subject.reference, subject.candidate, case))
    places = [p for start, left, _ in parts for p in range(start, start + left.shape[0])]
    return places, torch.cat([left for _, left, _ in parts]), torch.cat([right for _, _, right in parts])


def run(subject: Subject, case: str) -> list[Finding]:
    """One finding, with KL, top-k agreement and argmax flips beside the tensor metrics."""
    rule = logits_rule(subject)
    if rule is None:
        return []
    finding = measure_point(subject, rule, case, check="logits")
    if finding.verdict in ("error", "skip"):
        return [finding]
    _, left, right = logits_pair(subject, rule, case)
    measured = measure_logits(left, right)
    metrics = finding.metrics | as_metrics(measured)
    blame = subject.graph.blame(LOGITS) if finding.verdict == "fail" else ""
    return [msgspec.structs.replace(finding, metrics=metrics, located=blame)]


def as_metrics(measured: LogitMeasurement) -> dict[str, float | None]:
    """The scalar logit metrics by name."""
    return {
        "kl_mean": measured.kl_mean,
        "kl_max": measured.kl_max,
        "top_k_agreement": measured.top_k_agreement,
        "argmax_flips": float(len(measured.flips)),
    }


def cover(subject: Subject) -> Coverage:
    """The one point it looks at."""
    missing = [] if logits_rule(subject) else [Unmatched(side="candidate", point=LOGITS)]
    return Coverage(check="logits", points=1, compared=1 - len(missing), unmatched=missing)


CHECK = Check(
    name="logits",
    question="is the distribution over the next token the same, at every position?",
    run=run,
    cover=cover,
    detects=("lm-head", "softcap"),
)
