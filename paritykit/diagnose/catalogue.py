"""Every cause that ParityKit can name: code, what it is, how it is tested, where it happened. Torch-free.

Another package adds a cause through the entry point group ``paritykit.causes``: a ``CauseKind``, whose ``tests`` are
``package.module:function``, functions from a ``Scene`` to ``Trial`` and ``Pattern``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from paritykit.diagnose.causes.table import TABLE
from paritykit.errors import UnknownNameError
from paritykit.registry import Registry, load_attribute

HERE = "paritykit.diagnose.causes"
CAUSES: Registry[CauseKind] = Registry("cause")


@dataclass(frozen=True, kw_only=True)
class CauseKind:
    """A cause: ``what`` is wrong, how it is ``tested``, what to ``look`` at, where it was ``seen`` in public.

    ``tests`` are the functions that its hypotheses come from, ``package.module:function``, or ``module:function`` for
    those of ``paritykit.diagnose.causes``; empty for what is never tested.
    """

    code: str
    name: str
    what: str
    tested: str
    look: str
    seen: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()

    def source(self, target: str) -> Callable[[Any], Iterable[Any]]:
        """The function that one of ``tests`` names. Imports torch. Raises UsageError where there is none."""
        module = target.partition(":")[0]
        path = target if "." in module else f"{HERE}.{target}"
        found: Callable[[Any], Iterable[Any]] = load_attribute(path, kind=f"cause {self.name!r}")
        return found


for _row in TABLE:
    CAUSES.register(_row["name"], CauseKind(**_row))
UNKNOWN = CAUSES.get("unknown")


def find_cause(name: str) -> CauseKind:
    """The cause of that name or code. Raises UnknownNameError with the nearest."""
    for known, kind in CAUSES.items():
        if name in (known, kind.code) or name.upper() == kind.code:
            return kind
    raise UnknownNameError("cause", name, [n for known, kind in CAUSES.items() for n in (known, kind.code)])
