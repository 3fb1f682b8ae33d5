"""The process of a rank: ``python -m paritykit.engines.nano.rank RANK READ WRITE THREADS STORE``, where READ and WRITE
are file descriptors and STORE is a path.

It does what rank 0 calls for, answers every call, and ends when rank 0 hangs up.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

from paritykit.engines.nano.group import LostRankError, rank_device
from paritykit.engines.nano.place import Place
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.step import Plan
from paritykit.engines.nano.team import Answer, Call
from paritykit.engines.nano.worker import Worker
from paritykit.errors import ParityError, UsageError


def main(arguments: list[str]) -> None:
    """Serve rank 0 until it hangs up."""
    rank, read, write, threads = (int(a) for a in arguments[:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    calls, answers = Connection(read, writable=False), Connection(write, readable=False)
    settings = msgspec.msgpack.decode(calls.recv_bytes(), type=Settings)
    torch.set_num_threads(threads)
    place = Place.of(rank, settings, store=Path(arguments[4]))
    served: list[Worker] = []

    def answer(call: Call | None) -> Any:
        if call is None:
            device = rank_device(settings.device, rank=rank, gpus=torch.cuda.device_count())
            if device.type == "cuda":
                torch.cuda.set_device(device)
            served.append(Worker(settings, place))
            return None
        if call.method == "connect":
            return place.connect()
        if call.method == "run":
            served[0].run(msgspec.convert(call.arguments[0], Plan))
            return None
        return getattr(served[0], call.method)(*call.arguments)

    try:
        call: Call | None = None
        while True:
            found = _answered(answer, call)
            if found.failed and not found.usage:
                place.disconnect()  # the team is over: those who wait for this rank need not wait any longer
            answers.send_bytes(msgspec.msgpack.encode(found))
            call = msgspec.msgpack.decode(calls.recv_bytes(), type=Call)
    except (EOFError, BrokenPipeError):
        return


def _answered(answer: Any, call: Call | None) -> Answer:
    """What a call gave, or how it failed: rank 0 decides what that means."""
    try:
        return Answer(msgspec.Raw(msgspec.msgpack.encode(answer(call))))
    except ParityError as error:
        usage = isinstance(error, UsageError)
        return Answer(failed=True, error=type(error).__name__, message=str(error), usage=usage)
    except Exception as error:
        lost = isinstance(error, LostRankError)
        return Answer(failed=True, message=f"{type(error).__name__}: {error}", lost=lost)


if __name__ == "__main__":
    main(sys.argv[1:])
