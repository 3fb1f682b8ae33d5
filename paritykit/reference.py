"""The reference: as truth, one precision above the candidate, and in the candidate's own as twin and as ensemble.

All are run on first need, each once, one after the other in one process, and kept in the store.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from paritykit.captures.feed import Feed
from paritykit.captures.manifest import Manifest
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.comparison.ensemble import RECIPE, DrawPlan, Ensemble
from paritykit.comparison.twin import read_at_once
from paritykit.engines.base import Engine, Progress
from paritykit.engines.process import HostProcess
from paritykit.errors import EngineError, ParityError
from paritykit.registry import call_function
from paritykit.store import Store, joined_key

UNKNOWN = "this reference is not run in two dtypes"
PRECISION = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
ABOVE = {"float16": "float32", "bfloat16": "float32", "float32": "float64"}
"""The dtype of the truth for each dtype of a candidate."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """An engine that is not open yet, and the name under which what it gives for some cases is kept, if it may be."""

    engine: Any
    key: Callable[[list[Case]], str] | None = None


@dataclass(kw_only=True)
class Reference:
    """``truth`` and, where there is a noise floor to measure, ``twin``; ``plain`` runs where the truth cannot.

    ``no_floor`` says why there is no twin, ``no_ensemble`` why its rounding could not be drawn anew. ``variants`` are
    other ways to run it in the twin's dtype, by what differs; a variant gets all cases in one batch. ``host`` is a
    process of their own that they all share. ``cache`` is the dtype of a candidate's KV cache where that is of 8 bits:
    the draws then keep theirs so. With ``keep`` the twin's engine stays open until ``close``: it may draw again.
    """

    truth: Role
    twin: Role | None = None
    plain: Role | None = None
    no_floor: str = UNKNOWN
    no_ensemble: str = ""
    variants: dict[str, Role] = field(default_factory=dict)
    host: HostProcess | None = None
    store: Store | None = None
    folder: Path = field(default_factory=Path)
    cases: list[Case] = field(default_factory=list)
    progress: Progress | None = None
    starts: dict[str, int] = field(default_factory=dict)
    cache: str = ""
    keep: bool = False
    _opened: bool = False

    def prepare(self, *, folder: Path, cases: list[Case], progress: Progress | None = None, keep: bool = False) -> None:
        """Where captures go that are not kept, and what is run."""
        self.folder, self.cases, self.progress, self.keep = folder, cases, progress, keep

    @cached_property
    def capture(self) -> Capture:
        """What candidates are held against, with the tokens it chose. Raises EngineError if it cannot be run."""
        try:
            return self._take(self.truth, self.cases, "reference")
        except EngineError as error:
            if self.plain is None:
                raise
            self.twin, self.no_floor = None, str(error).splitlines()[0]
            return self._take(self.plain, self.cases, "reference")

    @cached_property
    def twin_capture(self) -> Capture | None:
        """The reference again, in the candidate's dtype and fed the same tokens; None where there is no twin.

        What it decodes for the most part it also reads at once, see ``comparison.twin``.
        """
        return self._twins[0]

    @property
    def ensemble(self) -> Ensemble | None:
        """What draws of the twin's rounding do, measured against the truth; None where it has none."""
        return self._cached if self.cache else self._twins[1]

    @cached_property
    def _cached(self) -> Ensemble | None:
        """The ensemble where keys and values are kept in ``cache``."""
        if self._twins[1] is None:
            return None
        return self._draw(self.capture, self._forced(self.capture), self._opened_twin)

    @cached_property
    def _twins(self) -> tuple[Capture | None, Ensemble | None]:
        """The twin and its ensemble, the engine started once for both."""
        truth = self.capture
        if self.twin is None:
            return None, None
        forced = self._forced(truth)
        try:
            found = self._take(self.twin, [*forced, *read_at_once(forced)], "twin", self._opened_twin)
            return found, self._draw(truth, forced, self._opened_twin)
        finally:
            if not self.keep:
                self._close_twin()

    def draw_fed(self, feed: Feed, cases: list[str]) -> Ensemble | None:
        """What the draws do where modules are fed the truth's values, on some cases; None where there is no ensemble.

        The twin's engine stays open for the next, until ``close``.
        """
        if self.ensemble is None:
            return None
        out = self.folder / f"drawn-{uuid.uuid4().hex[:8]}"
        forced = [c for c in self._forced(self.capture) if c.id in cases]
        plan = DrawPlan(feed=feed, cache=self.cache)
        found: Ensemble = self._opened_twin().draw(forced, truth=self.capture.path, out=out, plan=plan)
        return found

    def _opened_twin(self) -> Any:
        """The twin's engine, opened when it is first asked for."""
        assert self.twin is not None
        if not self._opened:
            self._open(self.twin, "twin")
            self._opened = True
        return self.twin.engine

    def _close_twin(self) -> None:
        if self.twin is not None and self._opened:
            self._opened = False
            self.twin.engine.close()

    def _open(self, role: Role, name: str) -> None:
        if self.progress:
            self.progress(f"starting {getattr(role.engine, 'name', 'reference')}", 0, 0)
        role.engine.open()
        self.starts[name] = self.starts.get(name, 0) + 1

    def _forced(self, truth: Capture) -> list[Case]:
        return [c.force(truth.continuation(c.id)) for c in self.cases]

    def _draw(self, truth: Capture, cases: list[Case], start: Callable[[], Engine]) -> Ensemble | None:
        """Kept as a capture is. An ensemble that cannot be had costs the ensemble, not the run."""
        plan = DrawPlan(cache=self.cache)

        def make(out: Path) -> Ensemble:
            engine: Any = start()
            if "draw" not in engine.capabilities:
                raise EngineError("the reference does not draw its rounding anew")
            found: Ensemble = engine.draw(cases, truth=truth.path, out=out, plan=plan, progress=self.progress)
            return found

        scratch = self.folder / f"ensemble-{plan.cache}"
        keys = [r.key for r in (self.truth, self.twin) if r is not None]
        try:
            if self.store is None or not all(keys):
                return make(scratch)
            parts = [key(cases) for key in keys if key is not None]
            name = joined_key(*parts, f"{plan.draws} draws, seed {plan.seed}, recipe {RECIPE}", plan.cache)
            return self.store.take(name, make, scratch=scratch, read=Ensemble.open)
        except ParityError as error:
            self.no_ensemble = str(error).splitlines()[0]
            return None

    def compute(self, target: str, arguments: Mapping[str, Any], *, kind: Any) -> Any:
        """What ``package.module:function`` gives, in the reference's process where that runs: it has the libraries.

        ``arguments`` and the result, which is of type ``kind``, are what JSON can hold.
        """
        if self.host is None or not self.host.running:
            return call_function(target, arguments, progress=self.progress)
        return self.host.compute(target, arguments, kind=kind, folder=self.folder, progress=self.progress)

    def run_variants(self) -> Iterator[tuple[str, Capture | EngineError]]:
        """What each of the variants gives, fed the truth's tokens, or the error that ended it."""
        forced = [msgspec.structs.replace(c, batch=0) for c in self._forced(self.capture)]
        self._close_twin()
        for number, (name, role) in enumerate(self.variants.items()):
            try:
                yield name, self._take(role, forced, f"variant{number}")
            except EngineError as error:
                yield name, error
        if self.host is not None:
            self.host.stop()

    def close(self) -> None:
        """Free everything."""
        for role in (self.truth, self.twin, self.plain, *self.variants.values()):
            if role is not None:
                role.engine.close()
        if self.host is not None:
            self.host.stop()

    def _take(self, role: Role, cases: list[Case], name: str, start: Callable[[], Engine] | None = None) -> Capture:
        """The capture of a role's engine: kept, or run now, by ``start`` where others use the engine too."""

        def make(out: Path) -> Capture:
            if start is not None:
                return start().run(cases, points=Selection(), out=out, progress=self.progress)
            try:
                self._open(role, name)
                found: Capture = role.engine.run(cases, points=Selection(), out=out, progress=self.progress)
                return found
            finally:
                role.engine.close()

        scratch = self.folder / name
        if self.store is None or role.key is None:
            return make(scratch)
        return self.store.take(role.key(cases), make, scratch=scratch, read=Capture.open)


def small_cache(manifest: Manifest) -> str:
    """The dtype of a candidate's KV cache, as its capture tells it, where that is of 8 bits; empty for any other."""
    dtype: str = manifest.facts.get("cache", "")
    return dtype if dtype.startswith("float8") else ""
