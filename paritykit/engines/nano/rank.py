"""The process of a rank: ``python -m paritykit.engines.nano.rank RANK READ WRITE STORE`` (file descriptors, a path).

It does what rank 0 calls for, answers every call, and ends when rank 0 hangs up.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

from paritykit.engines.nano.group import Gloo
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.step import Plan
from paritykit.engines.nano.team import Answer, Call
from paritykit.engines.nano.worker import Worker
from paritykit.errors import ParityError


def main(arguments: list[str]) -> None:
    """Serve rank 0 until it hangs up."""
    rank, read, write = (int(a) for a in arguments[:3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls, answers = Connection(read, writable=False), Connection(write, readable=False)
    settings = msgspec.msgpack.decode(calls.recv_bytes(), type=Settings)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.tensor_parallel_size))
    group = Gloo(rank, settings.tensor_parallel_size, store=Path(arguments[3]), timeout=settings.timeout)
    served: list[Worker] = []

    def answer(call: Call | None) -> Any:
        if call is None:
            served.append(Worker(settings, group))
            return None
        if call.method == "connect":
            return group.connect()
        if call.method == "run":
            served[0].run(msgspec.convert(call.arguments[0], Plan))
            return None
        return getattr(served[0], call.method)(*call.arguments)

    try:
        call: Call | None = None
        while True:
            answers.send_bytes(_answered(answer, call))
            call = msgspec.msgpack.decode(calls.recv_bytes(), type=Call)
    except (EOFError, BrokenPipeError):
        return


def _answered(answer: Any, call: Call | None) -> bytes:
    """What a call gave, or how it failed: rank 0 decides what that means."""
    try:
        return msgspec.msgpack.encode(Answer(msgspec.Raw(msgspec.msgpack.encode(answer(call)))))
    except ParityError as error:
        return msgspec.msgpack.encode(Answer(failed=True, error=type(error).__name__, message=str(error)))
    except Exception as error:
        return msgspec.msgpack.encode(Answer(failed=True, message=f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main(sys.argv[1:])
