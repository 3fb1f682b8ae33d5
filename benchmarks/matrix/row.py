"""What came of an architecture in a dtype: one line of JSON each, so that a sweep that broke goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from paritykit.errors import UsageError

Outcome = Literal["pass", "fail", "inconclusive", "refused", "could not run", "not drawn", "error"]
SETTLED = ("pass", "fail", "inconclusive", "refused", "not drawn")
"""Outcomes that are not tried again for the same source."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One clean pair that is to be run."""

    model_type: str
    dtype: str
    seed: int = 0
    explain: bool = True

    @property
    def name(self) -> str:
        """The model's name, as the command line takes it."""
        return f"drawn:{self.model_type}" + (f",seed={self.seed}" if self.seed else "")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. ``source`` is a digest of the code that it was run with.

    ``outcome``: a verdict; ``refused`` by an engine, with its ``reason``; ``could not run``, where an engine died or
    took too long; ``not drawn``, where no small config works; ``error``, a mistake of ParityKit's own. ``backend``: the
    class of vLLM's that was tried after its own, which refused for the reason ``refusal``.
    """

    task: Task
    source: str
    outcome: Outcome
    reason: str = ""
    architecture: str = ""
    backend: str = ""
    refusal: str = ""
    first: str = ""
    metric: str = ""
    value: float | None = None
    allowed: float | None = None
    causes: list[str] = []
    checks: dict[str, str] = {}
    compared: int = 0
    failed: int = 0
    unmatched: int = 0
    accumulated: int = 0
    named_alike: int = 0
    seconds: float = 0.0

    @property
    def false_alarm(self) -> bool:
        """Whether it failed though logits and tokens agree: nothing that comes out is computed wrongly."""
        return self.outcome == "fail" and {self.checks.get(n) for n in ("logits", "tokens")} == {"pass"}


def add_row(path: Path, row: Row) -> None:
    """Write one more line. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def read_rows(path: Path) -> list[Row]:
    """The last row of every task; a last line that is not whole is passed over. Raises UsageError."""
    found: dict[str, Row] = {}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = msgspec.json.decode(line, type=Row)
        except msgspec.MsgspecError as error:
            raise UsageError(f"{path}, line {number}: not a row of the matrix: {error}") from error
        found[f"{row.task.name} {row.task.dtype}"] = row
    return list(found.values())


def left(tasks: Iterable[Task], rows: Iterable[Row], source: str) -> list[Task]:
    """The tasks that there is no settled row of that source of; of any, where none is given."""
    done = {(r.task.name, r.task.dtype) for r in rows if (not source or r.source == source) and r.outcome in SETTLED}
    return [t for t in tasks if (t.name, t.dtype) not in done]
