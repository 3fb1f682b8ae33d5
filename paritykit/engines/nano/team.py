"""All ranks as one: rank 0 here, the others in processes of their own, every call made on all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import msgspec
import torch

from paritykit import errors
from paritykit.engines.nano.place import Place
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.step import Plan
from paritykit.engines.nano.worker import Worker
from paritykit.errors import EngineError, ParityError, UsageError

TAIL = 8
GLANCE = 0.05
GRACE = 3.0
SLACK = 10.0
"""Seconds beyond the ranks' own timeout before an answer is given up."""


class Call(msgspec.Struct, array_like=True):
    """A method of the rank's worker, and its arguments."""

    method: str
    arguments: list[Any] = []


class Answer(msgspec.Struct, array_like=True):
    """What it gave, or which error (a class of ``paritykit.errors``, or empty) it ended with.

    ``usage``: what was asked for cannot be, and the rank is as good as before; ``lost``: it failed for want of another.
    """

    value: msgspec.Raw = msgspec.Raw(b"\xc0")
    failed: bool = False
    error: str = ""
    message: str = ""
    usage: bool = False
    lost: bool = False


class RankProcess:
    """Another rank: ``python -m paritykit.engines.nano.rank``. It ends when its pipe does, so it outlives nobody."""

    def __init__(self, rank: int, settings: Settings, store: Path, *, threads: int) -> None:
        self.rank = rank
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="paritykit-rank-")  # noqa: SIM115  (closed by kill)
        call_read, call_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._calls = Connection(call_write, readable=False)
        self._answers = Connection(answer_read, writable=False)
        theirs = (call_read, answer_write)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paritykit.engines.nano.rank", *map(str, (rank, *theirs, threads, store))],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        for end in theirs:
            os.close(end)
        self._calls.send_bytes(msgspec.msgpack.encode(settings))

    def send(self, call: Call) -> None:
        """Send a call. Raises EngineError if the rank is gone."""
        try:
            self._calls.send_bytes(msgspec.msgpack.encode(call))
        except OSError as error:
            raise EngineError(self.obituary()) from error

    def receive(self, patience: float | None) -> Answer:
        """The next answer. Raises EngineError if the rank is gone or, after ``patience`` seconds, silent."""
        deadline = None if patience is None else time.monotonic() + patience
        try:
            while not self._answers.poll(GLANCE):
                if self.process.poll() is not None and not self._answers.poll():
                    raise EOFError
                if deadline is not None and time.monotonic() > deadline:
                    raise EngineError(f"rank {self.rank} of nano did not answer within {patience:.0f} seconds")
            return msgspec.msgpack.decode(self._answers.recv_bytes(), type=Answer)
        except (EOFError, OSError) as error:
            raise EngineError(self.obituary()) from error

    def obituary(self) -> str:
        """How the rank ended, and the last lines it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        code = self.process.returncode
        how = "stopped answering" if code is None else f"died of signal {-code}" if code < 0 else f"exited with {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-TAIL:]
        return f"rank {self.rank} of nano {how}" + ("; its last words:\n  " + "\n  ".join(lines) if lines else "")

    def stop(self, *, grace: float) -> None:
        """Hang up, give it ``grace`` seconds to end by itself, then end it."""
        self._calls.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._answers.close()
        self._log.close()


class Team:
    """``call`` runs a method of ``Worker`` on every rank. After one rank failed the team is over."""

    def __init__(self, settings: Settings) -> None:
        self._patience = settings.timeout + SLACK
        self._others: list[RankProcess] = []
        self._over = False
        self._folder: Path | None = None
        self._threads = torch.get_num_threads()
        try:
            place = self._recruit(settings) if settings.ranks > 1 else Place()
            self.worker = Worker(settings, place)
            self._check(self._answers(None))
            self._everyone(Call("connect"), place.connect, self._patience)
        except (RuntimeError, AssertionError) as error:
            self.close(grace=0.0)
            raise EngineError(f"nano cannot start {settings.model}: {_first_line(error)}") from error
        except BaseException:
            self.close(grace=0.0)
            raise

    def call(self, method: str, *arguments: Any, kind: Any = None) -> list[Any]:
        """What ``method`` gives on every rank, in order; other ranks' answers are read as ``kind``.

        Raises EngineError if a rank fails or dies, on whichever rank that was, and UsageError where all refuse.
        """
        call = Call(method, list(arguments))
        own, answers = self._everyone(call, lambda: getattr(self.worker, method)(*arguments), None)
        return [own, *(msgspec.msgpack.decode(a.value, type=kind) if kind else None for a in answers)]

    def run(self, plan: Plan) -> torch.Tensor:
        """See ``Worker.run``."""
        logits, _ = self._everyone(Call("run", [plan]), lambda: self.worker.run(plan), self._patience)
        found: torch.Tensor = logits
        return found

    def close(self, *, grace: float = GRACE) -> None:
        """End the other ranks. Safe to call twice."""
        others, self._others = self._others, []
        for rank in others:
            rank.stop(grace=grace)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
            torch.set_num_threads(self._threads)

    def _recruit(self, settings: Settings) -> Place:
        self._folder = Path(tempfile.mkdtemp(prefix="paritykit-ranks-"))
        store = self._folder / "store"
        threads = max(1, self._threads // settings.ranks)  # ranks that fight for cores wait for each other
        torch.set_num_threads(threads)
        for rank in range(1, settings.ranks):
            self._others.append(RankProcess(rank, settings, store, threads=threads))
        return Place.of(0, settings, store=store)

    def _everyone(self, call: Call, own: Callable[[], Any], patience: float | None) -> tuple[Any, list[Answer]]:
        """Do the same on all ranks. An error ends the team, but for a usage error that all agree on."""
        if self._over:
            raise EngineError("nano's ranks were stopped after an error; open the engine again")
        refusal, value = None, None
        try:
            for rank in self._others:
                rank.send(call)
            try:
                value = own()
            except UsageError as error:
                refusal = error
            answers = self._answers(patience)
        except RuntimeError as error:
            reason = self._reason()
            self._end()
            saw = f"rank 0 saw: {_first_line(error)}" if reason else _first_line(error)
            raise EngineError(f"{reason} ({saw})" if reason else f"nano failed: {saw}") from error
        except BaseException:
            self._end()
            raise
        refused = [refusal is not None, *(a.usage for a in answers.values())]
        if not all(refused) and (refusal is not None or any(a.failed for a in answers.values())):
            self._end()
        if refusal is not None:
            raise refusal
        self._check(answers)
        return value, list(answers.values())

    def _end(self) -> None:
        """Stop the other ranks for good; alone, rank 0 has nobody to be out of step with."""
        self._over = bool(self._others)
        self.close(grace=0.0)

    def _reason(self) -> str:
        """What the other ranks say of a failure that rank 0 saw, whoever knows it best; empty if all are well."""
        told: list[tuple[int, str]] = []
        for rank in self._others:
            try:
                answer = rank.receive(GRACE)
            except EngineError as error:
                told.append((rank.process.poll() is None, str(error)))
            else:
                if answer.failed:
                    told.append((2 * answer.lost, str(_error(answer, rank.rank))))
        return min(told, default=(0, ""), key=lambda t: t[0])[1]

    def _answers(self, patience: float | None) -> dict[int, Answer]:
        """The answers of the other ranks, by rank. Raises EngineError if one is gone or silent."""
        return {rank.rank: rank.receive(patience) for rank in self._others}

    def _check(self, answers: Mapping[int, Answer]) -> None:
        """Raise what a rank failed with: one that failed by itself rather than one that waited for it."""
        failed = [(a.lost, rank) for rank, a in answers.items() if a.failed]
        if failed:
            _, rank = min(failed)
            raise _error(answers[rank], rank)


def _error(answer: Answer, rank: int) -> ParityError:
    kind = getattr(errors, answer.error, EngineError) if answer.error else EngineError
    made: ParityError = kind.__new__(kind)
    made.args = (answer.message if answer.error else f"rank {rank} of nano failed: {answer.message}",)
    return made


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
