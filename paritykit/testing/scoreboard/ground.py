"""Engines that stay open as long as there is room, and what the reference computes, each made once."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paritykit.captures.feed import Feed
from paritykit.captures.reader import Capture, let_go
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.comparison.ensemble import Draw, DrawPlan, Ensemble
from paritykit.comparison.twin import read_at_once
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.engines.process import HostPool, ProcessEngine
from paritykit.reference import ABOVE

ROOM = 3
"""Engines in this process that stay open; in another process it is one for each number of ranks."""
KEPT = 16
"""Pairs of truth and twin that stay on disk."""


@dataclass(frozen=True)
class Sides:
    """The reference as truth, twin and ensemble, and the ``cases`` that a candidate is to run: fed what truth chose.

    ``draw`` runs draws of the twin's rounding that are fed the truth's values.
    """

    truth: Capture
    twin: Capture
    ensemble: Ensemble
    cases: list[Case]
    draw: Draw


@dataclass
class Ground:
    """``folder`` takes the captures. Engines are opened on first need; ``kept`` are pairs of the reference's."""

    folder: Path
    kept: int = KEPT
    hosts: HostPool = field(default_factory=HostPool)
    _open: dict[str, Any] = field(default_factory=dict)
    _sides: dict[str, Sides] = field(default_factory=dict)
    _local: list[Path] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def make(self, engine: str, model: Path, *, hosts: HostPool | None = None, **arguments: Any) -> Any:
        """An engine that is not open. vLLM's share a process for each number of ranks, one after the other.

        That process is one of ``hosts``, or of the ground's own.
        """
        if engine == "nano":
            return NanoEngine(str(model), **arguments)
        ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
        host = (hosts or self.hosts).get(f"{engine} on {ranks}")
        return ProcessEngine(engine, str(model), arguments, host=host)

    def engine(self, engine: str, model: Path, **arguments: Any) -> Any:
        """An open engine, the one with these arguments if there is one. Raises EngineError."""
        key = f"{engine} {model} {sorted(arguments.items())}"
        if key in self._open:
            self._open[key] = self._open.pop(key)
        else:
            made = self.make(engine, model, **arguments)
            self._make_room(made)
            made.open()
            self._open[key] = made
        return self._open[key]

    @contextlib.contextmanager
    def passing(self, engine: str, model: Path, **arguments: Any) -> Iterator[Any]:
        """An engine that is open inside the block only. Raises EngineError."""
        made = self.make(engine, model, **arguments)
        self._make_room(made)
        try:
            made.open()
            yield made
        finally:
            made.close()

    def run(self, engine: Any, cases: list[Case]) -> Capture:
        """All points of all cases, in a folder of its own, which goes with what is returned."""
        return let_go(engine.run(cases, points=Selection(), out=self.scratch()))

    def sides(self, model: Path, *, dtype: str, cases: list[Case]) -> Sides:
        """The reference on these cases: one precision above ``dtype`` on its weights, and in ``dtype`` itself."""
        key = f"{model} {dtype} {cases}"
        if key not in self._sides:
            while len(self._sides) >= self.kept:
                old = self._sides.pop(next(iter(self._sides)))
                self.drop(old.truth, old.twin)
                self.remove(old.ensemble.path)
            with self._reference(model, dtype=ABOVE[dtype], weights_dtype=dtype) as engine:
                truth = self.run(engine, cases)
            todo = fed(truth)
            with self._reference(model, dtype=dtype) as engine:
                twin = self.run(engine, [*todo, *read_at_once(todo)])
                ensemble = self._draw(engine, todo, truth)

            def draw(feed: Feed, names: list[str]) -> Ensemble:
                some = [c for c in todo if c.id in names]
                drawn = self._draw(self.engine("hf", model, dtype=dtype), some, truth, feed=feed)
                self._local.append(drawn.path)
                return drawn

            self._sides[key] = Sides(truth, twin, ensemble, todo, draw)
        return self._sides[key]

    def scratch(self) -> Path:
        """A path where nothing is yet."""
        return self.folder / f"{next(self._numbers)}"

    def drop(self, *captures: Capture) -> None:
        """Remove captures that are not looked at any more."""
        self.remove(*(c.path for c in captures))

    def drop_local(self) -> None:
        """Remove what was drawn for the modules of one candidate."""
        self.remove(*self._local)
        self._local.clear()

    def remove(self, *folders: Path) -> None:
        """Remove folders, also those that are not there."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close every engine and end every process; what is asked for later is opened anew."""
        engines, self._open = list(self._open.values()), {}
        for engine in engines:
            with contextlib.suppress(Exception):
                engine.close()
        self.hosts.stop()

    def _draw(self, engine: Any, cases: list[Case], truth: Capture, *, feed: Feed | None = None) -> Ensemble:
        found: Ensemble = engine.draw(cases, truth=truth.path, out=self.scratch(), plan=DrawPlan(feed=feed))
        return found

    @contextlib.contextmanager
    def _reference(self, model: Path, **arguments: Any) -> Iterator[HFEngine]:
        engine = HFEngine(str(model), **arguments)
        engine.open()
        try:
            yield engine
        finally:
            engine.close()

    def _make_room(self, engine: Any) -> None:
        """Close what is open in the process that ``engine`` is to open in, and in this one what is one too many."""
        host = getattr(engine, "host", None)

        def rival(other: Any) -> bool:
            return getattr(other, "host", None) is host

        self._close_some(rival, left=0 if host is not None else ROOM - 1)

    def _close_some(self, which: Callable[[Any], bool], *, left: int) -> None:
        found = [key for key, engine in self._open.items() if which(engine)]
        for key in found[: max(len(found) - left, 0)]:
            self._open.pop(key).close()


def fed(truth: Capture) -> list[Case]:
    """The cases of a capture, to be fed what it chose."""
    return [c.force(truth.continuation(c.id)) for c in truth.cases.values()]
