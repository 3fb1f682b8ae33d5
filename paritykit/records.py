"""The records of a run, put together: sides, cases, findings, and the verdict over them."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

import paritykit
from paritykit.checks.base import Subject
from paritykit.config import Config, load_config
from paritykit.diagnose.edits.ask import Ask
from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import UsageError
from paritykit.results import CaseInfo, Coverage, Finding, Results, Run, Side, WeightRow
from paritykit.verdict import summarise

ENVIRONMENT = (
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_CPU_OMP_THREADS_BIND",
    "OMP_NUM_THREADS",
)
"""Environment variables a report may show."""


def run_record(
    reference: Side,
    candidate: Side,
    checks: list[str],
    *,
    command: list[str] | None = None,
    starts: dict[str, int] | None = None,
) -> Run:
    """The first record of a run, made now."""
    return Run(
        paritykit=paritykit.__version__,
        reference=reference,
        candidate=candidate,
        checks=checks,
        command=shlex.join(command or []),
        environment=environment(),
        starts=starts or {},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def case_infos(subject: Subject, *, free: dict[str, list[int]] | None = None) -> list[CaseInfo]:
    """The cases with what each side produced; ``free`` is what the candidate chose by itself."""
    reference, candidate = subject.reference, subject.candidate
    chosen = free if free is not None else {c: candidate.generated(c) for c in reference.cases}
    return [
        CaseInfo(
            id=c.id,
            tokens=list(c.tokens),
            new_tokens=c.new_tokens,
            batch=c.batch,
            reference_tokens=reference.generated(c.id),
            candidate_tokens=chosen.get(c.id, []),
        )
        for c in reference.cases.values()
    ]


def assemble(
    run: Run,
    *,
    coverage: list[Coverage],
    findings: list[Finding],
    cases: list[CaseInfo],
    config: Config,
    weights: list[WeightRow] | None = None,
    seconds: float | None = None,
    notes: Iterable[str] = (),
) -> Results:
    """All records of a run; ``notes`` say what its verdict does not speak of."""
    summary = summarise(run.checks, coverage, findings, min_coverage=config["min_coverage"], seconds=seconds)
    summary = msgspec.structs.replace(summary, notes=list(dict.fromkeys(notes)))
    return Results(run=run, cases=cases, coverage=coverage, findings=findings, weights=weights or [], summary=summary)


def explain_findings(
    findings: list[Finding],
    *,
    subject: Subject | None,
    checkpoint: Checkpoint | None = None,
    ask: Ask | None = None,
) -> list[Finding]:
    """``findings`` with the causes of the first points that differ, see ``paritykit.diagnose.explain``.

    Without ``checkpoint`` it is looked for where the reference says that its model is. Hypotheses that need a weight
    are left out where there is none, as are those whose stand-in does not give the reference's numbers. ``ask`` edits
    the reference's code where none of them fits.
    """
    from paritykit.diagnose.explain import explain
    from paritykit.diagnose.known import named

    known = named(findings)
    if subject is None or not any(f.verdict == "fail" for f in known):
        return known
    from paritykit.engines.weights import TensorReader

    source = checkpoint or _checkpoint_of(subject.reference.manifest.side)
    return explain(
        known,
        reference=subject.reference,
        candidate=subject.candidate,
        rules=subject.mapping.rules,
        config=source.text_config if source else None,
        read=TensorReader(source) if source else None,
        ask=ask,
    )


def _checkpoint_of(side: Side) -> Checkpoint | None:
    """The folder that a side was made of, where it is still there."""
    try:
        return Checkpoint.find(side.model) if side.model and Path(side.model).is_dir() else None
    except UsageError:
        return None


def checkpoint_side(checkpoint: Checkpoint | None) -> Side:
    """A checkpoint as a side of a run."""
    if checkpoint is None:
        return Side(engine="checkpoint", model="", dtype="")
    return Side(engine="checkpoint", model=str(checkpoint.path), dtype=checkpoint.dtype, digest=checkpoint.digest)


def environment() -> dict[str, str]:
    """What of the environment may be shown: an allow-list, never everything."""
    shown = {n: os.environ[n] for n in ENVIRONMENT if n in os.environ}
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count()), **shown}


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum((Counter(c) for c in counts), Counter()))


def merge_results(parts: list[Results]) -> Results:
    """One run of several that looked at the same two engines: findings together, the verdict made anew."""
    first = parts[0]
    checks = list(dict.fromkeys(name for part in parts for name in part.run.checks))
    coverage = {c.check: c for part in parts for c in part.coverage}
    cases = {c.id: c for part in parts for c in part.cases}
    findings = list({(f.check, f.case, f.point): f for part in parts for f in part.findings}.values())
    summary = summarise(checks, list(coverage.values()), findings, min_coverage=load_config()["min_coverage"])
    notes = list(dict.fromkeys(note for part in parts for note in part.summary.notes))
    summary = msgspec.structs.replace(summary, notes=notes)
    return Results(
        run=msgspec.structs.replace(first.run, checks=checks, starts=_added(part.run.starts for part in parts)),
        cases=list(cases.values()),
        coverage=list(coverage.values()),
        findings=findings,
        weights=list(
            {(w.tensor, w.parameter, w.rank, w.source, w.target): w for p in parts for w in p.weights}.values()
        ),
        summary=summary,
    )
