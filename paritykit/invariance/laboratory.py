"""Runs trials of one engine, each once, and keeps what they gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from paritykit.captures.manifest import Manifest, split_key
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.comparison.routing import Router, find_routers
from paritykit.diagnose.locate import Graph
from paritykit.engines.base import Engine, Progress
from paritykit.errors import EngineError, UsageError
from paritykit.invariance.compare import View
from paritykit.invariance.pool import EnginePool
from paritykit.invariance.trial import Arguments, Trial
from paritykit.ledger.judge import Judged

T = TypeVar("T")


class Laboratory:
    """The engine under test, its cases, and the reference's manifest for names; a ``Bench`` for properties.

    ``own`` is that engine as the user asked for it, open; ``pool`` starts it with other arguments, None where that is
    not possible. ``points`` are glob patterns of what trials record that do not say it themselves, None for all: where
    only some are, nothing can be located, and the first difference is answer enough. A bench that is not ``thorough``
    picks few of the ways to run. ``weights`` judges what an open engine's loader did.
    """

    def __init__(
        self,
        *,
        own: Callable[[], Engine],
        pool: EnginePool | None,
        reference: Callable[[], Manifest],
        cases: list[Case],
        folder: Path,
        points: tuple[str, ...] | None = None,
        thorough: bool = True,
        weights: Callable[[Engine], Judged] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.cases = cases
        self._weights = weights
        self._judged: dict[bytes, Judged | UsageError] = {}
        self._thorough = thorough
        self._points = points
        self._own, self._pool, self._reference = own, pool, reference
        self._folder, self._progress = folder, progress
        self._views: dict[bytes, View] = {}

    @property
    def brief(self) -> bool:
        """Whether one difference is answer enough."""
        return self._points is not None

    @cached_property
    def reference(self) -> Manifest:
        """Names and execution order of the reference."""
        return self._reference()

    @cached_property
    def graph(self) -> Graph:
        """Who fed whom, in the reference."""
        return Graph(self.reference)

    @cached_property
    def routers(self) -> tuple[Router, ...]:
        """The reference's routers, where a model has experts."""
        return tuple(find_routers(self.reference))

    @cached_property
    def terms(self) -> int:
        """The most terms that a sum in this model has: the widest row of any point, or the longest text."""
        widest = max((math.prod(p.row) for p in self.reference.points if p.port != "logits"), default=1)
        return max(widest, *(c.positions for c in self.cases))

    @property
    def capabilities(self) -> frozenset[str]:
        """What the engine can do."""
        return self._own().capabilities

    @property
    def args(self) -> Mapping[str, str]:
        """How the engine runs when left as the user asked for it."""
        return self._own().describe().args

    @property
    def parallel(self) -> Mapping[str, int]:
        """Its parallel sizes."""
        return self._own().describe().parallel

    @property
    def engine(self) -> str:
        """Its name."""
        return self._own().describe().engine

    def variations(self, kind: str) -> list[Arguments]:
        """See ``Bench.variations``."""
        found: Mapping[str, Sequence[Arguments]] = getattr(self._own(), "variations", {})
        return self.pick([dict(a) for a in found.get(kind, ()) if self._differing(a)])

    def pick(self, options: Sequence[T], *, few: int = 1) -> list[T]:
        """See ``Bench.pick``."""
        return list(options) if self._thorough else list(options[:few])

    def continuation(self, trial: Trial) -> dict[str, list[int]]:
        """See ``Bench.continuation``."""
        view = self.view(trial)
        return {c.id: view.capture.continuation(c.id) for c in trial.cases}

    def view(self, trial: Trial) -> View:
        """What a trial gave, under the reference's names; run on first need. Raises UsageError, EngineError."""
        arguments = self._differing(trial.arguments)
        key = msgspec.json.encode(msgspec.structs.replace(trial, name="", arguments=arguments), order="sorted")
        if key not in self._views:
            engine = self._engine(arguments)
            if trial.poison is not None:
                poison: Any = engine
                poison.poison_cache(trial.poison)
            points = Selection(self._looks if trial.points is None else trial.points)
            out = self._folder / f"trial{len(self._views)}"
            if self._progress:
                self._progress(f"running: {trial.name}", 0, 0)
            self._views[key] = View(engine.run(list(trial.cases), points=points, out=out), self.reference)
        return self._views[key]

    def weights(self, trial: Trial) -> Judged:
        """What the loader did to the weights, in the engine of a trial. Raises UsageError where that is not known."""
        arguments = self._differing(trial.arguments)
        key = msgspec.json.encode(arguments, order="sorted")
        if key not in self._judged:
            self._judged[key] = self._judge_weights(self._engine(arguments))
        found = self._judged[key]
        if isinstance(found, UsageError):
            raise found
        return found

    def _judge_weights(self, engine: Engine) -> Judged | UsageError:
        if self._weights is None or "ledger" not in engine.capabilities:
            return UsageError(f"engine {self.engine} does not say where its loader puts weights")
        try:
            found = self._weights(engine)
        except EngineError as error:
            return UsageError(str(error))
        untraced = "" if found.findings else "; ".join(s.reason for s in found.coverage.skipped)
        return UsageError(untraced) if untraced else found

    @property
    def _looks(self) -> tuple[str, ...] | None:
        """What trials record: with the points that were asked for the routers, which explain much."""
        names = {split_key(r.key)[0].rpartition(".")[2] for r in self.routers}
        return None if self._points is None else (*self._points, *(f"*.{n}" for n in sorted(names)))

    def _engine(self, arguments: dict[str, Any]) -> Engine:
        if not arguments:
            return self._own()
        if self._pool is None:
            raise UsageError("this engine cannot be started again with other arguments")
        engine = self._pool.get(arguments)
        check_taken(arguments, engine)
        return engine

    def _differing(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are not the engine's own already."""
        own = {**self.args, **{k: str(v) for k, v in self.parallel.items()}}
        return {k: v for k, v in sorted(arguments.items()) if own.get(k) != str(v)}


def check_taken(arguments: Mapping[str, Any], engine: Engine) -> None:
    """Raise UsageError where an engine says that it runs otherwise than it was asked to."""
    side = engine.describe()
    told = {**side.args, **{k: str(v) for k, v in side.parallel.items()}}
    other = [f"{k}={told[k]}, not {v}" for k, v in arguments.items() if told.get(k, str(v)) != str(v)]
    if other:
        raise UsageError(f"engine {side.engine} runs this model with {', '.join(other)}")
