"""The only wiring: engines are opened one after the other, captured, compared, judged, and the records put together."""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import msgspec

import paritykit
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.checks import CHECKS
from paritykit.checks.base import Subject
from paritykit.comparison.tolerance import check_overrides
from paritykit.config import Config, load_config
from paritykit.engines.base import Engine, Progress
from paritykit.errors import UsageError
from paritykit.mapping.build import build_mapping
from paritykit.mapping.user import UserRule
from paritykit.results import CaseInfo, Coverage, Finding, Results, Run
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


class Session:
    """Two engines on the same cases. Captures are made on first need, the reference's first, one engine at a time.

    Use as a context manager: engines are closed and temporary captures removed on leaving it.
    """

    def __init__(
        self,
        *,
        reference: Engine,
        candidate: Engine,
        cases: list[Case],
        config: Config | None = None,
        rules: list[UserRule] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config or load_config()
        self._tolerance = check_overrides(self.config["tolerance"])
        self._engines = {"reference": reference, "candidate": candidate}
        self._cases = cases
        self._rules = rules
        self._progress = progress
        self._folder = tempfile.TemporaryDirectory(prefix="paritykit-")
        self._opened: set[str] = set()
        self._free: dict[str, list[int]] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open and remove the captures."""
        for side in list(self._opened):
            self._close(side)
        self._folder.cleanup()

    @cached_property
    def reference(self) -> Capture:
        """The reference's capture, with the tokens it chose."""
        capture = self._run("reference", self._cases, "reference", points=None)
        self._close("reference")
        return capture

    @cached_property
    def candidate(self) -> Capture:
        """The candidate's capture, fed the reference's tokens."""
        forced = [c.force(self.reference.continuation(c.id)) for c in self._cases]
        return self._run("candidate", forced, "candidate", points=None)

    @property
    def chosen_freely(self) -> dict[str, list[int]] | None:
        """What ``free_tokens`` found, if it was asked for."""
        return self._free

    def free_tokens(self) -> dict[str, list[int]]:
        """What the candidate chooses when left alone, by case id; runs it once more, without recording."""
        if self._free is None:
            capture = self._run("candidate", self._cases, "free", points=[])
            self._free = {c.id: capture.generated(c.id) for c in self._cases}
        return self._free

    @cached_property
    def subject(self) -> Subject:
        """What checks look at. Raises UsageError for a rule of the user's that fits nothing."""
        mapping = build_mapping(self.reference.manifest, self.candidate.manifest, user=self._rules)
        return Subject(
            reference=self.reference,
            candidate=self.candidate,
            mapping=mapping,
            tolerance=self._tolerance,
            tolerance_source=self.config.source("tolerance"),
            free=self.free_tokens,
        )

    def results(self, checks: Iterable[str], *, command: list[str] | None = None) -> Results:
        """Run ``checks`` over all cases and put the records of the run together."""
        started = time.monotonic()
        subject = self.subject
        names = list(checks)
        found = run_checks(subject, names, progress=self._progress)
        ended = time.monotonic()
        return assemble(
            subject, names, *found, config=self.config, command=command, free=self._free, seconds=ended - started
        )

    def _run(self, side: str, cases: list[Case], name: str, *, points: list[str] | None) -> Capture:
        engine = self._engines[side]
        if side not in self._opened:
            self._opened.add(side)
            self._say(f"starting {getattr(engine, 'name', side)}")
            engine.open()
        return engine.run(cases, points=Selection(points), out=Path(self._folder.name) / name, progress=self._progress)

    def _close(self, side: str) -> None:
        self._opened.discard(side)
        self._engines[side].close()

    def _say(self, what: str) -> None:
        if self._progress:
            self._progress(what, 0, 0)


def run_checks(
    subject: Subject, checks: Iterable[str], *, progress: Progress | None = None
) -> tuple[list[Coverage], list[Finding]]:
    """Coverage and findings of ``checks`` over every case of the subject. UnknownNameError for an unknown check."""
    loaded = [CHECKS.get(name) for name in checks]
    todo = [(check, case) for check in loaded for case in subject.reference.cases]
    findings: list[Finding] = []
    for number, (check, case) in enumerate(todo):
        if progress:
            progress(f"comparing: {check.name}", number, len(todo))
        findings += check.run(subject, case)
    return [check.cover(subject) for check in loaded], findings


def assemble(
    subject: Subject,
    checks: list[str],
    coverage: list[Coverage],
    findings: list[Finding],
    *,
    config: Config,
    command: list[str] | None = None,
    free: dict[str, list[int]] | None = None,
    seconds: float | None = None,
) -> Results:
    """All records of a run."""
    reference, candidate = subject.reference, subject.candidate
    run = Run(
        paritykit=paritykit.__version__,
        reference=reference.manifest.side,
        candidate=candidate.manifest.side,
        checks=checks,
        command=shlex.join(command or []),
        environment=environment(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    chosen = free if free is not None else {c: candidate.generated(c) for c in reference.cases}
    cases = [
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
    summary = summarise(checks, coverage, findings, min_coverage=config["min_coverage"], seconds=seconds)
    return Results(run=run, cases=cases, coverage=coverage, findings=findings, summary=summary)


def compare_captures(
    reference: Capture,
    candidate: Capture,
    *,
    checks: Iterable[str] | None = None,
    config: Config | None = None,
    rules: list[UserRule] | None = None,
    command: list[str] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Compare two captures from disk. ``tokens`` sees only what the candidate chose while it was fed.

    Raises UsageError if they do not hold the same tokens.
    """
    config = config or load_config()
    check_same_tokens(reference, candidate)
    subject = Subject(
        reference=reference,
        candidate=candidate,
        mapping=build_mapping(reference.manifest, candidate.manifest, user=rules),
        tolerance=check_overrides(config["tolerance"]),
        tolerance_source=config.source("tolerance"),
    )
    names = list(checks) if checks is not None else CHECKS.names()
    return assemble(subject, names, *run_checks(subject, names, progress=progress), config=config, command=command)


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


def environment() -> dict[str, str]:
    """What of the environment may be shown: an allow-list, never everything."""
    shown = {n: os.environ[n] for n in ENVIRONMENT if n in os.environ}
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count()), **shown}


def merge_results(parts: list[Results]) -> Results:
    """One run of several that looked at the same two engines: findings together, the verdict made anew."""
    first = parts[0]
    checks = list(dict.fromkeys(name for part in parts for name in part.run.checks))
    coverage = {c.check: c for part in parts for c in part.coverage}
    cases = {c.id: c for part in parts for c in part.cases}
    findings = list({(f.check, f.case, f.point): f for part in parts for f in part.findings}.values())
    summary = summarise(checks, list(coverage.values()), findings, min_coverage=load_config()["min_coverage"])
    return Results(
        run=msgspec.structs.replace(first.run, checks=checks),
        cases=list(cases.values()),
        coverage=list(coverage.values()),
        findings=findings,
        summary=summary,
    )
