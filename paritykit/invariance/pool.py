"""Engines that are open: one for each set of arguments, the last few kept, every start counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from paritykit.engines.base import Engine

Make = Callable[[dict[str, Any]], Engine]
"""The engine under test with these arguments in place of its own, not started."""


class EnginePool:
    """``get(arguments)`` is an open engine. Beside the last ``kept`` ones none stays open."""

    def __init__(self, make: Make, *, kept: int = 1) -> None:
        self._make, self._kept = make, kept
        self._open: dict[bytes, Engine] = {}
        self.starts: dict[str, int] = {}

    def get(self, arguments: Mapping[str, Any]) -> Engine:
        """The engine under these arguments; started if it is not open. Raises UsageError, EngineError."""
        key = msgspec.json.encode(dict(arguments), order="sorted")
        engine = self._open.pop(key, None)
        if engine is None:
            while len(self._open) >= self._kept:
                self._open.pop(next(iter(self._open))).close()
            engine = self._make(dict(arguments))
            try:
                engine.open()
            except BaseException:
                engine.close()
                raise
            told = ", ".join(f"{k}={v}" for k, v in arguments.items())
            self.starts[told] = self.starts.get(told, 0) + 1
        self._open[key] = engine
        return engine

    def close(self) -> None:
        """Close every engine."""
        opened, self._open = self._open, {}
        for engine in opened.values():
            engine.close()
