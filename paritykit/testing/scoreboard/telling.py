"""How far a run is: a line that goes away on a terminal, otherwise one now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from paritykit.progress import ProgressLine
from paritykit.testing.scoreboard.plan import Trial

EVERY = 20.0
"""Seconds between lines where nobody looks."""


class Teller:
    """A context manager that is called with how many trials are done, of how many, and which is next."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._line = ProgressLine(quiet=quiet)
        self._plain = not quiet and not sys.stderr.isatty()
        self._said, self._last = 0.0, ""

    def __enter__(self) -> Teller:
        self._line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._line.__exit__(kind, error, tb)

    def __call__(self, done: int, total: int, trial: Trial | None) -> None:
        """Show it; ``trial`` is not known where other processes run them."""
        what = "" if trial is None else f"{trial.engine} {trial.model} {trial.dtype} {trial.fault or trial.when}"
        text = f"{done} of {total} {what}".strip()
        self._line(text, done, total)
        now = time.monotonic()
        if self._plain and text != self._last and (now - self._said > EVERY or done == total):
            self._said, self._last = now, text
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
