"""Shards side by side, each a process of its own with a book of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from paritykit.errors import EngineError, UsageError

PATIENCE = 60.0
"""Seconds that a process has to close its engines."""
TAIL = 8


def run_in_processes(
    count: int, options: Sequence[str], folder: Path, *, tell: Callable[[], None] | None = None, pause: float = 2.0
) -> None:
    """Run the command with ``options`` on each of so many shards, ``tell`` called now and then until all are done.

    Raises UsageError where a shard refused the options, EngineError where one ended otherwise; what they printed is in
    ``folder``.
    """
    logs = [folder / f"shard-{n}-of-{count}.log" for n in range(1, count + 1)]
    children = [_start(log, [*options, "--shard", f"{n}/{count}"]) for n, log in enumerate(logs, 1)]
    try:
        while any(child.poll() is None for child in children):
            if tell is not None:
                tell()
            time.sleep(pause)
    finally:
        _end(children)
    for child, log in zip(children, logs, strict=True):
        if child.returncode:
            last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
            kind = UsageError if child.returncode == UsageError.exit_code else EngineError
            raise kind(f"a shard ended with {child.returncode}; the end of {log}:\n{last}")
    if tell is not None:
        tell()


def _start(log: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "paritykit.testing.scoreboard", *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """See to it that none is left."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
