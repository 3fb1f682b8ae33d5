"""The process an engine lives in: ``python -m paritykit.engines.child READ WRITE LIFELINE`` (file descriptors).

When the parent goes, for whatever reason, the lifeline ends and the whole process group with it: no orphans.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from paritykit.captures.recorder import Selection
from paritykit.engines import build_engine
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
    decode_order,
    encode,
)
from paritykit.errors import EngineMissingError, ParityError, UsageError
from paritykit.registry import call_function


def main(arguments: list[str]) -> None:
    """Serve orders until the parent hangs up."""
    orders, answers, lifeline = (int(a) for a in arguments)
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host = _Host(Connection(answers, readable=False))
    incoming = Connection(orders, writable=False)
    while True:
        try:
            order = decode_order(incoming.recv_bytes())
        except EOFError:
            host.close()
            return
        host.serve(order)


class _Host:
    """Holds the engine that is open, if any."""

    def __init__(self, answers: Connection) -> None:
        self._answers = answers
        self._engine: Any = None

    def serve(self, order: Order) -> None:
        """Carry out one order and answer it."""
        try:
            answer = self._carry_out(order)
        except ParityError as error:
            behind = error.__cause__ is not None and not isinstance(error, UsageError | EngineMissingError)
            if behind:
                traceback.print_exc()
            answer = Failed(type(error).__name__, str(error), logged=behind)
        except Exception as error:
            traceback.print_exc()
            answer = Failed("", f"{type(error).__name__}: {error}", logged=True)
        self._say(answer)

    def close(self) -> None:
        """Close the engine, if one is open."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()

    def _carry_out(self, order: Order) -> Answer:
        if isinstance(order, Open):
            self.close()
            self._engine = build_engine(order.engine, order.model, order.arguments)
            self._engine.open()
            variations = getattr(self._engine, "variations", {})
            return Done(self._engine.describe(), sorted(self._engine.capabilities), variations)
        if isinstance(order, Close):
            self.close()
            return Done()
        if isinstance(order, Compute):
            found = call_function(order.target, order.arguments, progress=self._progress)
            Path(order.out).write_bytes(msgspec.json.encode(found))
            return Done()
        self._use(order)
        return Done()

    def _use(self, order: Order) -> None:
        """Carry out an order to the engine that is open."""
        if isinstance(order, ReadLedger):
            Path(order.out).write_bytes(msgspec.json.encode(self._engine.ledger()))
        elif isinstance(order, PoisonCache):
            self._engine.poison_cache(order.value)
        elif isinstance(order, CallFunction):
            if not hasattr(self._engine, "call"):
                raise UsageError(f"{type(self._engine).__name__} calls no functions in its workers; nano and vllm do")
            self._engine.call(order.target, order.arguments, host=order.host)
        elif isinstance(order, DrawRounding):
            self._draw(order)
        elif isinstance(order, RunCases):
            self._run(order)

    def _draw(self, order: DrawRounding) -> None:
        self._engine.draw(
            order.cases,
            truth=Path(order.truth),
            out=Path(order.out),
            plan=order.plan,
            progress=self._progress,
        )

    def _run(self, order: RunCases) -> None:
        fed = {} if order.feed is None else {"feed": order.feed}
        self._engine.run(
            order.cases, points=Selection(order.points), out=Path(order.out), progress=self._progress, **fed
        )

    def _progress(self, what: str, done: int, total: int) -> None:
        self._say(Working(what, done, total))

    def _say(self, answer: Answer) -> None:
        self._answers.send_bytes(encode(answer))


def _die_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    end_group(os.getpgid(0))


if __name__ == "__main__":
    main(sys.argv[1:])
