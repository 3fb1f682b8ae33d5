"""Every error ParityKit raises on purpose.

::

    ParityError                 exit code 3: it could not run
    ├── UsageError              exit code 2: the user asked for something that does not exist or cannot be
    │   ├── UnknownNameError    a name that no registry, capture or case set has ("did you mean ...")
    │   └── CaptureFormatError  a folder that is not a capture, or a truncated, tampered or newer one
    ├── EngineError             an engine could not start, crashed, or ran out of something
    │   └── EngineMissingError  the library an engine needs is not installed, or is broken
    └── ParityFailure           exit code 1: two engines differ (also an AssertionError, for pytest)

Anything else that escapes is a defect of ParityKit.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ParityError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns for it."""

    exit_code = 3


class UsageError(ParityError):
    """The request cannot be met as written; the message says what to write instead."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that is not there; the message lists the nearest ones.

    >>> str(UnknownNameError("engine", "vlm", ["hf", "vllm"]))
    "unknown engine 'vlm'; did you mean 'vllm'? (have: hf, vllm)"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, shown: int = 12) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        listing = ", ".join(names[:shown]) + (f", ... {len(names)} in all" if len(names) > shown else "")
        super().__init__(f"unknown {kind} {name!r}{hint} (have: {listing or 'none'})")


class CaptureFormatError(UsageError):
    """A capture that must not be read: missing, incomplete, truncated, tampered with, or of another schema."""


class EngineError(ParityError):
    """An engine could not do its part; nothing is known about parity."""


class EngineMissingError(EngineError):
    """The engine's library is not installed or does not import; the message names the fix."""


class ParityFailure(ParityError, AssertionError):  # noqa: N818  (the design's public name)
    """Two engines differ. Carries the finished text of the failure."""

    exit_code = 1
