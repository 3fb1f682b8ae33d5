"""Progress on the terminal: one line that goes away, on standard error, and only where somebody looks."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class ProgressLine:
    """A context manager that is also the callback engines and runners report to: ``line("hf", 2, 10)``."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show what is going on; ``total`` 0 where nobody knows how long it takes."""
        if self._task is None:
            self._task = self._bar.add_task(what, total=None)
        self._bar.update(self._task, description=what, completed=done, total=total or None)
