"""What further runs of a candidate say of findings: flips settled, modules replayed. Each step may fail alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from paritykit.checks.base import Subject
from paritykit.comparison.ensemble import Draw
from paritykit.diagnose.accumulated import accumulate
from paritykit.engines.base import Progress
from paritykit.notes import attempt
from paritykit.replays import Replays, cases_to_replay
from paritykit.results import Finding
from paritykit.routed import Routed


class Reruns:
    """Further runs of a subject's candidate, which ``engine`` opens on first need; captures go into ``folder``.

    ``draw`` is for draws that are fed as the candidate is. What fails is said in ``notes``.
    """

    def __init__(
        self,
        subject: Subject,
        engine: Callable[[], Any],
        *,
        folder: Path,
        notes: list[str],
        draw: Draw | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._subject, self._engine, self._folder = subject, engine, folder
        self._notes, self._draw, self._progress = notes, draw, progress

    def look(self, findings: list[Finding], *, explain: bool, local: bool | None) -> list[Finding]:
        """``findings`` with a verdict behind expert flips and with local errors.

        With ``explain`` modules are replayed where a case fails, with ``local`` in every case: where it is None in the
        shortest, if none fails.
        """
        if any(f.verdict == "inconclusive" for f in findings):
            unsettled = findings
            findings = self._attempt("settling expert flips", lambda: self._routed.settle(unsettled), unsettled)
        cases = cases_to_replay(findings, self._subject, asked=local if explain else bool(local))
        if cases:
            free = findings
            findings = self._attempt("the replay", lambda: self._replays.explain_all(free, cases=cases), free)
        if not explain or not any(f.verdict == "fail" for f in findings):
            return findings
        replayed = self._attempt("the replay", lambda: self._replays.explain(findings), findings)
        done = self._replays.done if "_replays" in self.__dict__ else frozenset[str]()
        return accumulate(replayed, replayed=done)

    @cached_property
    def _routed(self) -> Routed:
        return Routed(self._subject, self._engine(), folder=self._folder, progress=self._progress)

    @cached_property
    def _replays(self) -> Replays:
        return Replays(self._subject, self._engine(), draw=self._draw, progress=self._progress)

    def _attempt(self, what: str, make: Callable[[], list[Finding]], instead: list[Finding]) -> list[Finding]:
        return attempt(what, make, instead, notes=self._notes)
