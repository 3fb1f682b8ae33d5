"""Check ``weights``: does every element of the checkpoint arrive once, unchanged, where it belongs?"""

from __future__ import annotations

from paritykit.checks.base import Answer, ModelCheck, ModelSubject
from paritykit.ledger.judge import judge_weights


def run(subject: ModelSubject) -> Answer:
    """One finding for every checkpoint tensor, and for every parameter that no tensor explains."""
    judged = judge_weights(subject.weights)
    return Answer(coverage=judged.coverage, findings=judged.findings, weights=judged.rows)


CHECK = ModelCheck(
    name="weights",
    question="does every element of the checkpoint arrive once, unchanged, where it belongs?",
    run=run,
    needs="ledger",
    detects=(
        "weight-not-loaded",
        "bias-missing",
        "rows-permuted",
        "gate-up-swapped",
        "norm-offset",
        "weight-transposed",
        "expert-swapped",
        "weight-shared-wrongly",
        "weight-corrupt",
    ),
)
