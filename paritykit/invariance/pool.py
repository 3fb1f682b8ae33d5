"""The engine under test with other arguments than its own: one is open at a time, every start counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from paritykit.engines.base import Engine

Make = Callable[[dict[str, Any]], Engine]
"""The engine under test with these arguments in place of its own, not started."""


class EnginePool:
    """``get(arguments)`` is an open engine, the last one if it is asked for again."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._open: tuple[bytes, Engine] | None = None
        self.starts: dict[str, int] = {}

    def get(self, arguments: Mapping[str, Any]) -> Engine:
        """The engine under these arguments; started if it is not open. Raises UsageError, EngineError."""
        key = msgspec.json.encode(dict(arguments), order="sorted")
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        self.close()
        engine = self._make(dict(arguments))
        try:
            engine.open()
        except BaseException:
            engine.close()
            raise
        told = ", ".join(f"{k}={v}" for k, v in arguments.items())
        self.starts[told] = self.starts.get(told, 0) + 1
        self._open = key, engine
        return engine

    def close(self) -> None:
        """Close what is open."""
        opened, self._open = self._open, None
        if opened is not None:
            opened[1].close()
