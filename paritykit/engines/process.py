"""Any engine in a process of its own: engines patch the libraries they share, and crash in their own ways."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import msgspec

from paritykit import errors
from paritykit.captures.feed import Feed
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.comparison.ensemble import DrawPlan, Ensemble
from paritykit.engines.base import Progress
from paritykit.engines.failure import crash_of, explain, keep_log
from paritykit.engines.group import end_group
from paritykit.engines.messages import (
    Answer,
    CallFunction,
    Close,
    Compute,
    Done,
    DrawRounding,
    Failed,
    Open,
    Order,
    PoisonCache,
    ReadLedger,
    RunCases,
    Working,
    decode_answer,
    encode,
)
from paritykit.errors import EngineError, ParityError
from paritykit.provenance.weightmap import RankLedger
from paritykit.results import Side

TAIL = 12
PATIENCE = 20.0
HEARTBEAT = 1.0
"""Seconds between looks at whether a silent process is alive: one it forked may hold the pipe open after its end."""


class HostProcess:
    """A child process that opens engines one after another; started on first use, stopped with all its children."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._begun = 0

    def ask(self, order: Order, *, progress: Progress | None = None) -> Done:
        """Send an order and wait for its answer. Raises what the engine raised; EngineError if the process died."""
        self.begin(order)
        return self.finish(progress=progress)

    def begin(self, order: Order) -> None:
        """Send an order. ``finish`` waits for its answer, before the next order."""
        if self._process is None:
            self._start()
        self._begun = len(self._printed())
        try:
            self._orders.send_bytes(encode(order))
        except OSError:
            pass  # it has died, and finish says so
        except BaseException:
            self.kill()
            raise

    def finish(self, *, progress: Progress | None = None) -> Done:
        """Wait for the answer to what was begun. Raises as ``ask`` does."""
        try:
            while isinstance(answer := self._receive(), Working):
                if progress:
                    progress(answer.what, answer.done, answer.total)
        except (EOFError, OSError) as error:
            raise EngineError(self._obituary()) from error
        except BaseException:
            self.kill()
            raise
        if isinstance(answer, Failed):
            raise self._error(answer)
        return answer

    def compute(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        kind: Any,
        folder: Path,
        progress: Progress | None = None,
    ) -> Any:
        """What ``package.module:function`` gives, called in the process; it comes back by a file in ``folder``.

        ``arguments`` and the result, which is of type ``kind``, are what JSON can hold.
        """
        out = folder / f"computed-{uuid.uuid4().hex[:8]}.json"
        try:
            self.ask(Compute(target, dict(arguments), str(out.absolute())), progress=progress)
            return msgspec.json.decode(out.read_bytes(), type=kind)
        finally:
            out.unlink(missing_ok=True)

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def stop(self) -> None:
        """Let the process end by itself, then make sure that it and its children have."""
        if self._process is None:
            return
        try:
            self._orders.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        finally:
            self.kill()

    def interrupt(self) -> None:
        """End the whole process group while another thread waits for its answer: that thread sees it die."""
        process = self._process
        if process is not None:
            end_group(process.pid)

    def kill(self) -> None:
        """End the whole process group, whatever it is doing."""
        if self._process is None:
            return
        end_group(self._process.pid)
        self._process.wait()
        for end in (self._orders, self._answers):
            end.close()
        os.close(self._lifeline)
        if self._log is not None:
            self._log.close()
        self._process = self._log = None

    def _start(self) -> None:
        order_read, order_write = os.pipe()
        answer_read, answer_write = os.pipe()
        life_read, self._lifeline = os.pipe()
        theirs = (order_read, answer_write, life_read)
        self._orders = Connection(order_write, readable=False)
        self._answers = Connection(answer_read, writable=False)
        self._log = tempfile.TemporaryFile(prefix="paritykit-engine-")  # noqa: SIM115  (closed by kill)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paritykit.engines.child", *map(str, theirs)],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        for end in theirs:
            os.close(end)

    def _receive(self) -> Answer:
        assert self._process is not None
        while not self._answers.poll(HEARTBEAT):
            if self._process.poll() is not None and not self._answers.poll():
                raise EOFError
        answer: Answer = decode_answer(self._answers.recv_bytes())
        return answer

    def _obituary(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        code = self._process.returncode
        how = "stopped answering" if code is None else f"died of signal {-code}" if code < 0 else f"exited with {code}"
        log = self._printed()
        file = keep_log(log)
        crash = crash_of(log)
        told = [crash or self.tail(), explain(log, message=""), f"  whole log: {file}" if file else ""]
        text = f"the engine's process {how}; {'innermost first' if crash else 'its last words'}:" + "".join(
            f"\n{t}" for t in told if t
        )
        self.kill()
        return text

    def _error(self, answer: Failed) -> ParityError:
        kind = getattr(errors, answer.error, EngineError) if answer.error else EngineError
        text = f"{answer.message}{self._behind(answer.message)}" if answer.logged else answer.message
        made: ParityError = kind.__new__(kind)
        made.args = (text,)
        return made

    def _behind(self, message: str) -> str:
        """Where in the user's code an error came from, what is likely, and the file that the whole log is kept in."""
        log = self._printed()
        file = keep_log(log)
        told = [explain(log[self._begun :], message=message), f"  whole log: {file}" if file else ""]
        return "".join(f"\n{text}" for text in told if text)

    def _printed(self) -> str:
        if self._log is None:
            return ""
        file = self._log.fileno()  # the child writes where this file's own offset is, so that must stay
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def tail(self) -> str:
        """The last lines the process printed."""
        return "\n".join(f"  {line}" for line in self._printed().splitlines()[-TAIL:])


class HostPool:
    """Host processes by name: engines that ask for the same one share it, one after the other."""

    def __init__(self) -> None:
        self._hosts: dict[str, HostProcess] = {}

    def get(self, name: str) -> HostProcess:
        """The process of that name."""
        return self._hosts.setdefault(name, HostProcess())

    def __contains__(self, host: object) -> bool:
        return any(host is known for known in self._hosts.values())

    def stop(self) -> None:
        """End every process."""
        hosts, self._hosts = self._hosts, {}
        for host in hosts.values():
            host.stop()


class ProcessEngine:
    """An engine by name, in a host process: the same protocol as the engine itself.

    ``host`` may be shared by engines that are open one after another: it saves importing their libraries again.
    """

    def __init__(self, name: str, model: str, arguments: dict[str, Any], *, host: HostProcess | None = None) -> None:
        self.name = name
        self.capabilities: frozenset[str] = frozenset()
        self.variations: dict[str, list[dict[str, Any]]] = {}
        self._order = Open(name, model, arguments)
        self.host = host or HostProcess()
        self._shared = host is not None
        self._side: Side | None = None
        self._begun = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What the engine is made with, by name."""
        return {"model": self._order.model, "arguments": self._order.arguments}

    def begin(self) -> None:
        """Let the process start and load the model while others work; ``open`` waits for it.

        A process that runs already may be at work for another engine, so there ``open`` does it all.
        """
        if not self.host.running:
            self._begun = True
            self.host.begin(self._order)

    def open(self) -> None:
        """Start the process and load the model."""
        begun, self._begun = self._begun, False
        answer = self.host.finish() if begun else self.host.ask(self._order)
        self._side, self.capabilities = answer.side, frozenset(answer.capabilities)
        self.variations = answer.variations

    def run(
        self,
        cases: list[Case],
        *,
        points: Selection,
        out: Path,
        progress: Progress | None = None,
        feed: Feed | None = None,
    ) -> Capture:
        """See ``Engine.run``. Nothing half-written is left behind, even if the process is killed."""
        patterns = None if points.patterns is None else list(points.patterns)
        try:
            self.host.ask(RunCases(cases, patterns, str(out.absolute()), feed), progress=progress)
        finally:
            for left in out.parent.glob(f".{out.name}.*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        return Capture.open(out)

    def draw(
        self, cases: list[Case], *, truth: Path, out: Path, plan: DrawPlan, progress: Progress | None = None
    ) -> Ensemble:
        """See ``HFEngine.draw``: an engine that is capable of ``draw`` has it."""
        self.host.ask(DrawRounding(cases, str(truth.absolute()), str(out.absolute()), plan), progress=progress)
        return Ensemble.open(out)

    def ledger(self) -> list[RankLedger]:
        """See ``Engine.ledger``; handed over as a file."""
        with tempfile.TemporaryDirectory(prefix="paritykit-ledger-") as folder:
            path = Path(folder) / "ledger.json"
            self.host.ask(ReadLedger(str(path)))
            return msgspec.json.decode(path.read_bytes(), type=list[RankLedger])

    def call(self, target: str, arguments: Mapping[str, Any], *, host: bool = False) -> None:
        """Call a function in the engine's process, as the engine's own ``call`` does: nano and vLLM have one."""
        self.host.ask(CallFunction(target, dict(arguments), host))

    def poison_cache(self, value: float) -> None:
        """See ``Engine``."""
        self.host.ask(PoisonCache(value))

    def describe(self) -> Side:
        """The engine as it really runs; EngineError before ``open``."""
        if self._side is None:
            raise EngineError(f"engine {self.name!r} is not open")
        return self._side

    def close(self) -> None:
        """Close the engine, and its process unless that is shared."""
        opened, self._side = self._side is not None, None
        begun, self._begun = self._begun, False
        if begun:
            self.host.kill()
        elif not self._shared:
            self.host.stop()
        elif opened and self.host.running:
            self.host.ask(Close())
