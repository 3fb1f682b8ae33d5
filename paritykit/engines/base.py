"""What an engine is: an adapter that runs a model on cases and is captured. A protocol; there is no base class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.results import Side

Progress = Callable[[str, int, int], None]
"""Told (what is going on, steps done, steps in all or 0 where unknown)."""


@runtime_checkable
class Engine(Protocol):
    """An engine, opened once, run many times, closed for good.

    ``capabilities`` may hold: ``logits`` (point ``#logits`` for every position), ``decode`` (new tokens after the
    prompt), ``teacher_forcing`` (feeds ``case.forced``), ``tensor_parallel``, ``ledger``: the engine then also has
    ``ledger() -> list[RankLedger]``, where its loader put every weight on each rank, made while it was opened.
    """

    capabilities: frozenset[str]

    def open(self) -> None:
        """Load the model. Raises EngineError if it cannot."""
        ...

    def run(self, cases: list[Case], *, points: Selection, out: Path, progress: Progress | None = None) -> Capture:
        """Run ``cases`` batch by batch, recording ``points`` into the new folder ``out``.

        Every row is labelled by (case, position). Raises EngineError if the engine fails.
        """
        ...

    def describe(self) -> Side:
        """The engine as it really runs: versions, dtype, device, backend."""
        ...

    def close(self) -> None:
        """Free everything: memory, processes, hooks. Safe to call twice."""
        ...


def batches(cases: list[Case]) -> list[list[Case]]:
    """The cases grouped by batch, batches in ascending order."""
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.batch, []).append(case)
    return [groups[k] for k in sorted(groups)]
