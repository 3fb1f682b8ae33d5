"""A process for vLLM that begins as a fork of one that has imported it: importing it takes longer than a tiny model.

The process that is forked has one thread and has computed nothing; each pair gets a fork of its own, so that what one
model leaves behind, or breaks, does not reach the next.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from paritykit.engines.process import HostProcess
from paritykit.engines.vllm.warm import IMPORTED


class Forked:
    """A forked process, with what of ``subprocess.Popen`` a host asks for."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def poll(self) -> int | None:
        """As ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("vllm", timeout or 0)
        return self.returncode


class WarmHost(HostProcess):
    """A host process that is forked from one in which vLLM is imported."""

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED, "benchmarks.matrix.warm"])
        order_read, self._orders = context.Pipe(duplex=False)
        self._answers, answer_write = context.Pipe(duplex=False)
        life_read, life_write = context.Pipe(duplex=False)
        self._lifeline = os.dup(life_write.fileno())
        log = tempfile.NamedTemporaryFile(prefix="paritykit-engine-")  # noqa: SIM115  (closed by kill)
        self._log = log
        process = context.Process(target=serve, args=(order_read, answer_write, life_read, log.name), daemon=False)
        process.start()
        self._process = Forked(process)  # type: ignore[assignment]
        for end in (order_read, answer_write, life_read, life_write):
            end.close()


def serve(orders: Connection, answers: Connection, lifeline: Connection, log: str) -> None:
    """What the forked process does: serve orders, and print into ``log``."""
    from paritykit.engines.child import main

    os.setsid()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main([str(os.dup(end.fileno())) for end in (orders, answers, lifeline)])
