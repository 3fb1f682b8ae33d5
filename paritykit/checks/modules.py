"""Check ``modules``: does every module give what the reference's gives, at every position?"""

from __future__ import annotations

import msgspec

from paritykit.captures.manifest import CACHE_PORTS, split_key
from paritykit.checks.base import LOGITS, Check, Subject
from paritykit.checks.measured import measure_point
from paritykit.diagnose.locate import locate
from paritykit.results import Coverage, Finding


def run(subject: Subject, case: str) -> list[Finding]:
    """One finding for every mapped point, in execution order, failures marked introduced or inherited."""
    found = [measure_point(subject, r, case, check="modules") for r in subject.mapping.rules if r.reference != LOGITS]
    found += [
        Finding(
            check="modules",
            case=case,
            point=m.reference,
            verdict="fail",
            metric="shape",
            message=m.message,
            order=subject.graph.order(m.reference),
            candidate_point=m.candidate,
            mapping=m.candidate,
        )
        for m in subject.mapping.misfits
    ]
    return locate(found, subject.graph) + disagreements(subject, case)


def cached(subject: Subject, case: str, *, check: str) -> list[Finding]:
    """One finding for every point of the KV cache: what the candidate holds against what the reference cached.

    Nothing between the caches is looked at: the first layer whose cache is wrong counts as the one that introduced it.
    """
    rules = [r for r in subject.mapping.rules if split_key(r.reference)[1] in CACHE_PORTS]
    found = locate([measure_point(subject, r, case, check=check) for r in rules], subject.graph)
    first = next((split_key(f.point)[0] for f in found if f.verdict == "fail"), "")
    return [
        msgspec.structs.replace(f, origin="inherited") if f.verdict == "fail" and split_key(f.point)[0] != first else f
        for f in found
    ]


def disagreements(subject: Subject, case: str) -> list[Finding]:
    """A failing finding for every rule that says another place than where the module's weights are."""
    return [
        Finding(
            check="modules",
            case=case,
            point=f"{d.reference}#mapping",
            verdict="fail",
            metric="mapping",
            message=f"declared as {d.declared}, but its weights are in {d.landed}",
            origin="introduced",
            order=subject.graph.order(d.reference),
            located=d.reference,
            candidate_point=d.declared.partition(" ")[0],
        )
        for d in subject.mapping.disagreements
    ]


def cover(subject: Subject) -> Coverage:
    """Every output of the reference, compared or left out with its reason; inputs count only where compared.

    A point that is named alike is none of both: it has findings that say so.
    """
    mapping = subject.mapping
    compared = len(mapping.rules) + len(mapping.misfits) - any(r.reference == LOGITS for r in mapping.rules)
    left = [u for u in (*mapping.skipped, *mapping.unmatched) if u.point != LOGITS]
    return Coverage(
        check="modules",
        points=compared + len(mapping.alike) + sum(u.side == "reference" for u in left),
        compared=compared,
        skipped=[u for u in left if u.reason],
        unmatched=[u for u in left if not u.reason],
    )


CHECK = Check(
    name="modules",
    question="does every module give what the reference's gives, at every position?",
    run=run,
    cover=cover,
    detects=("rope-theta", "norm-eps", "gate-up-swapped", "bias-missing", "attention-scale", "residual", "lm-head"),
)
