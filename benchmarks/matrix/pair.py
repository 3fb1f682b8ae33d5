"""One clean pair: draw the model, run both engines, keep what was said."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import msgspec

from benchmarks.matrix.row import Outcome, Row, Task
from benchmarks.matrix.warm import WarmHost
from paritykit.engines.failure import message_of
from paritykit.engines.process import HostProcess
from paritykit.errors import EngineError, EngineMissingError, ParityError, UsageError
from paritykit.plan import make_plan
from paritykit.results import Results
from paritykit.session import Session
from paritykit.testing.drawn.catalogue import BACKEND, class_names, find_class, vllm_classes
from paritykit.testing.folders import without_folders

DIED = ("the engine's process died", "the engine's process exited", "the engine's process stopped")
LAST_WORDS = "; the engine's last words:"
"""Follows the text of an exception that the engine's process did not expect."""
REFUSALS = ("vLLM cannot start", "vLLM failed on")
"""Begin what vLLM says of a model that it does not run; what the reference refuses begins otherwise."""
CASES = ("short", "long-40")
"""Longer than the windows and chunks of drawn models, and short enough for hundreds of pairs."""
LONGEST = 300
"""Letters of a reason that are kept."""


class Pairs:
    """Runs pairs one after the other: the reference in one process, vLLM in a fork for each."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._reference = HostProcess()

    def run(self, task: Task) -> Row:
        """What comes of it; what cannot be is an outcome too.

        A model that vLLM's own class refuses runs once more in its Transformers backend, if that takes it.
        """
        started = time.monotonic()
        row = self._tried(task, {})
        if row.outcome == "refused" and row.reason.startswith(REFUSALS) and has_backend(task.model_type):
            other = self._tried(task, {"model_impl": "transformers"})
            row = msgspec.structs.replace(other, backend=BACKEND, refusal=row.reason)
        return msgspec.structs.replace(row, seconds=round(time.monotonic() - started, 1))

    def close(self) -> None:
        """End the reference's process; the next pair starts another."""
        with suppress(Exception):
            self._reference.kill()

    def _tried(self, task: Task, engine_args: dict[str, Any]) -> Row:
        row = Row(task=task, source=self._source, outcome="error", architecture=class_names()[task.model_type])
        try:
            return self._ran(row, engine_args)
        except EngineMissingError:
            raise
        except UsageError as error:
            drawn = "no small config" in str(error)
            return _with(row, "not drawn" if drawn else "refused", reason_of(error))
        except EngineError as error:
            return _with(row, outcome_of(error), reason_of(error))
        except ParityError as error:
            return _with(row, "refused", reason_of(error))
        except Exception as error:  # a mistake of ParityKit's own is an outcome, and told
            self.close()
            return _with(row, "error", f"{type(error).__name__}: {error}")

    def _ran(self, row: Row, engine_args: dict[str, Any]) -> Row:
        task = row.task
        plan = make_plan(
            task.name,
            given={"candidate": "vllm", "dtype": task.dtype},
            case_names=CASES,
            engine_args=engine_args,
            explain=task.explain,
        )
        host = WarmHost()
        try:
            session = Session(
                reference=plan.reference(host=self._reference),
                candidate=plan.candidate_engine(host),
                cases=plan.resolve_cases(),
                config=plan.config,
                checkpoint=plan.checkpoint,
                explain=task.explain,
            )
            with session:
                return told(row, session.results(plan.checks))
        finally:
            host.kill()


def has_backend(model_type: str) -> bool:
    """Whether vLLM has a class of its own for the model and its Transformers backend takes it as well."""
    return vllm_classes()[model_type] != BACKEND and bool(find_class(model_type).is_backend_compatible())


def outcome_of(error: EngineError) -> Outcome:
    """What an engine's error is: its end, an exception that nobody foresaw, or a refusal.

    >>> outcome_of(EngineError("vLLM cannot start the model: no such head size"))
    'refused'
    """
    text = str(error)
    if text.startswith(DIED):
        return "could not run"
    return "error" if LAST_WORDS in text else "refused"


def told(row: Row, results: Results) -> Row:
    """The row with what the records say."""
    summary = results.summary
    first = next((f for f in results.findings if f.verdict == "fail"), None)
    if summary.first_divergence is not None:
        seen = (summary.first_divergence.check, summary.first_divergence.seen_at or summary.first_divergence.point)
        first = next((f for f in results.findings if f.verdict == "fail" and (f.check, f.point) == seen), first)
    return msgspec.structs.replace(
        row,
        outcome=summary.verdict if summary.verdict in ("pass", "fail", "inconclusive") else "error",
        reason=_short(summary.message or (first.message if first else "")),
        first=summary.first_divergence.point if summary.first_divergence else "",
        metric=f"{first.check}: {first.metric}" if first else "",
        value=first.value if first else None,
        allowed=first.allowed if first else None,
        causes=[f"{c.code} {c.name} {c.confidence:.2f}" for c in summary.causes[:3]],
        checks={name: str(verdict) for name, verdict in summary.checks.items()},
        compared=summary.compared,
        failed=summary.failed,
        unmatched=summary.unmatched,
        accumulated=sum(f.kind == "accumulated" for f in results.findings),
        named_alike=sum(f.kind == "named_alike" for f in results.findings),
    )


def _with(row: Row, outcome: Outcome, reason: str) -> Row:
    return msgspec.structs.replace(row, outcome=outcome, reason=_short(reason))


def reason_of(error: ParityError) -> str:
    """What an engine says, without folders of this machine: the model's, its last words, and where its log is."""
    return without_folders(message_of(str(error).partition(LAST_WORDS)[0]))


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST]
