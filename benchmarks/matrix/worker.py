"""A process that runs pairs: a task a line in, a row a line out. What anything prints goes to the other stream."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import msgspec

from benchmarks.matrix.pair import Pairs
from benchmarks.matrix.row import Task


def main() -> None:
    """Serve tasks until the parent hangs up."""
    answers: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    pairs = Pairs(sys.argv[1])
    try:
        for line in sys.stdin.buffer:
            answers.write(msgspec.json.encode(pairs.run(msgspec.json.decode(line, type=Task))) + b"\n")
            answers.flush()
    finally:
        pairs.close()


if __name__ == "__main__":
    main()
