"""The Python interface: ``run``, ``capture``, ``compare``, and what a comparison gives back.

::

    import paritykit as pk

    ref = pk.capture(pk.engine("hf", MODEL, dtype="float32"), cases=pk.cases("smoke"))
    cand = pk.capture(pk.engine("vllm", MODEL), cases=pk.cases("smoke"), follow=ref)
    run = pk.compare(reference=ref, candidate=cand)
    run.raise_on_failure()
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paritykit.captures.reader import Capture, let_go
from paritykit.captures.recorder import Selection
from paritykit.case import Case, CaseSet, validate
from paritykit.engines.base import Progress
from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import ParityFailure, UsageError
from paritykit.mapping.user import read_rules
from paritykit.models import cases_for
from paritykit.plan import make_plan
from paritykit.reports import write_report
from paritykit.reports.terminal import failure_text
from paritykit.repro import command_of
from paritykit.results import Divergence, Results, Summary
from paritykit.runner import compare_captures, weight_results


class ParityRun:
    """A finished comparison: its records, and reports made from them."""

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    def summary(self) -> Summary:
        """Verdict and counts."""
        return self.results.summary

    @property
    def first_divergence(self) -> Divergence | None:
        """Where the difference starts; None at parity."""
        return self.results.summary.first_divergence

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the HTML report."""
        write_report(self.results, format="html", path=path)

    def to_markdown(self, path: str | os.PathLike[str]) -> None:
        """Write the Markdown report."""
        write_report(self.results, format="markdown", path=path)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the records: every other report can be made from them."""
        write_report(self.results, format="jsonl", path=path)

    def raise_on_failure(self) -> None:
        """Raise ParityFailure unless the verdict is ``pass``: too little compared is not parity either."""
        if self.summary.verdict != "pass":
            raise ParityFailure(failure_text(self.results))


def run(
    model: str | os.PathLike[str],
    *,
    candidate: str | None = None,
    reference: str | None = None,
    checks: Sequence[str] = (),
    cases: CaseSet | None = None,
    dtype: str | None = None,
    reference_dtype: str | None = None,
    tensor_parallel_size: int = 1,
    engine_args: Mapping[str, Any] | None = None,
    reference_args: Mapping[str, Any] | None = None,
    map_file: str | os.PathLike[str] | None = None,
    floor: bool = True,
    explain: bool = True,
    local: bool | None = None,
    progress: Progress | None = None,
) -> ParityRun:
    """What ``paritykit run`` does, with its defaults: both engines by name, in processes of their own.

    ::

        pk.run("tiny:qwen2", candidate="nano", checks=["batching"], cases=pk.cases("len-17+4")).raise_on_failure()

    ``engine_args`` go to the candidate. Without ``floor`` no noise floor is measured, without ``explain`` no modules
    are replayed and no causes looked for. Where all passes every module is replayed in the shortest cases: with
    ``local`` always and in all, with ``local=False`` never. Raises UsageError for what cannot be, EngineError if an
    engine does not run.
    """
    given = {"candidate": candidate, "reference": reference, "dtype": dtype, "reference_dtype": reference_dtype}
    told = given if floor else {**given, "floor": False}
    plan = make_plan(
        os.fspath(model),
        given=told,
        checks=checks,
        case_names=cases.names if cases else (),
        fixed=cases.fixed if cases else (),
        engine_args=engine_args,
        reference_args=reference_args,
        tensor_parallel_size=tensor_parallel_size,
        map_file=map_file,
        explain=explain,
        local=local,
    )
    names = cases.names if cases else plan.case_names
    with plan.open(progress=progress) as session:
        return ParityRun(session.results(plan.checks, command=command_of(plan, cases=names, checks=checks)))


def capture(
    engine: Any,
    *,
    cases: CaseSet | Iterable[Case],
    points: Iterable[str] | None = None,
    follow: Capture | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Capture:
    """Open ``engine``, run ``cases``, close it. Returns the capture; temporary unless ``out`` names a new folder.

    ``points`` are glob patterns over point names (default: all). ``follow`` is a capture whose generated tokens this
    engine is fed, so that the positions after the prompt are comparable. Raises UsageError or EngineError.
    """
    try:
        engine.open()
        todo = follow_tokens(concrete_cases(cases, engine.describe().model), follow)
        if out is not None:
            return engine.run(todo, points=Selection(points), out=Path(out), progress=progress)  # type: ignore[no-any-return]
        folder = Path(tempfile.mkdtemp(prefix="paritykit-"))
        try:
            return let_go(engine.run(todo, points=Selection(points), out=folder / "capture", progress=progress), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        engine.close()


def concrete_cases(cases: CaseSet | Iterable[Case], model: str) -> list[Case]:
    """The cases for a model: recipes drawn over its vocabulary, ids and lengths checked. Raises UsageError."""
    folder = Path(model).is_dir()
    if not isinstance(cases, CaseSet):
        return validate(list(cases), vocab_size=Checkpoint.find(model).vocab_size if folder else 1 << 62)
    if not folder:
        raise UsageError(
            f"built-in cases need a checkpoint folder to know the vocabulary; pass Case objects to {model!r}"
        )
    return cases_for(Checkpoint.find(model), cases)


def weights(
    engine: Any,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> ParityRun:
    """Open ``engine``, see where its own loader puts every weight and whether it arrives unchanged, and close it.

    ``checkpoint`` is the folder it loads, where its own description does not say. Raises UsageError for an engine whose
    loader cannot be traced, EngineError if it does not open.
    """
    try:
        engine.open()
        if "ledger" not in engine.capabilities:
            raise UsageError(f"engine {getattr(engine, 'name', '')!r} does not say where its loader puts weights")
        side = engine.describe()
        folder = str(checkpoint or side.model)
        found = Checkpoint.find(folder) if Path(folder).is_dir() else None
        return ParityRun(weight_results(engine.ledger(), side, found))
    finally:
        engine.close()


def follow_tokens(cases: list[Case], follow: Capture | None) -> list[Case]:
    """``cases``, each fed what ``follow`` generated after it. Raises UsageError for a case that ``follow`` lacks."""
    if follow is None:
        return cases
    missing = next((c.id for c in cases if c.id not in follow.cases), None)
    if missing is not None:
        raise UsageError(f"{follow.path} has no case {missing!r} to follow")
    return validate([c.force(follow.continuation(c.id)) for c in cases], vocab_size=1 << 62)


def compare(
    *,
    reference: Capture | str | os.PathLike[str],
    candidate: Capture | str | os.PathLike[str],
    checks: Iterable[str] | None = None,
    map_file: str | os.PathLike[str] | None = None,
    engine: Any = None,
) -> ParityRun:
    """Compare two captures, or the folders they are in. Raises UsageError if they cannot be compared.

    With ``engine``, the candidate as it was captured, modules are replayed where a case fails: it is opened for that.
    """
    rules = read_rules(map_file) if map_file is not None else None
    ours, theirs = (c if isinstance(c, Capture) else Capture.open(Path(c)) for c in (reference, candidate))
    return ParityRun(compare_captures(ours, theirs, checks=checks, rules=rules, engine=engine))
