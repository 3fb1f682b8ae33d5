"""The tasks one after the other, in a process that is replaced where it dies or takes too long."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from benchmarks.matrix.row import Row, Task, add_row
from paritykit.testing.drawn.catalogue import class_names

Tell = Callable[[int, int, Row], None]


class Worker:
    """A process that runs pairs; started on first need."""

    def __init__(self, source: str, log: Path) -> None:
        self._source, self._log = source, log
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, task: Task, *, seconds: float) -> Row:
        """What comes of a task: ``could not run`` where the process died or took longer than so many seconds."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(task) + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else b""
        except BrokenPipeError:
            ready, line = [process.stdout], b""
        if line:
            return msgspec.json.decode(line, type=Row)
        self.stop()
        reason = "the process that runs both engines died" if ready else f"it took longer than {seconds:g} s"
        architecture = class_names()[task.model_type]
        return Row(task=task, source=self._source, outcome="could not run", reason=reason, architecture=architecture)

    def stop(self) -> None:
        """End the process; the engines' own end with it."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.matrix.worker", self._source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )


def run_tasks(tasks: Sequence[Task], book: Path, *, source: str, seconds: float, tell: Tell | None = None) -> None:
    """Run ``tasks`` and write a row of each into ``book`` before the next begins."""
    worker = Worker(source, book.with_suffix(".log"))
    try:
        for number, task in enumerate(tasks, 1):
            row = worker.run(task, seconds=seconds)
            add_row(book, row)
            if tell is not None:
                tell(number, len(tasks), row)
    finally:
        worker.stop()
