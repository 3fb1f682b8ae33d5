"""The reference: as truth, one precision above the candidate, and as twin, in the candidate's own.

Both are run on first need, each once, one after the other in one process, and kept in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.comparison.twin import read_at_once
from paritykit.engines.base import Engine, Progress
from paritykit.engines.process import HostProcess
from paritykit.errors import EngineError
from paritykit.store import Store

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

    ``no_floor`` says why there is no twin. ``variants`` are other ways to run it in the twin's dtype, by what differs;
    a variant gets all cases in one batch. ``host`` is a process of their own that they all share.
    """

    truth: Role
    twin: Role | None = None
    plain: Role | None = None
    no_floor: str = UNKNOWN
    variants: dict[str, Role] = field(default_factory=dict)
    host: HostProcess | None = None
    store: Store | None = None
    folder: Path = field(default_factory=Path)
    cases: list[Case] = field(default_factory=list)
    progress: Progress | None = None
    starts: dict[str, int] = field(default_factory=dict)

    def prepare(self, *, folder: Path, cases: list[Case], progress: Progress | None) -> None:
        """Where captures go that are not kept, and what is run."""
        self.folder, self.cases, self.progress = folder, cases, progress

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
        truth = self.capture
        if self.twin is None:
            return None
        forced = [c.force(truth.continuation(c.id)) for c in self.cases]
        found = self._take(self.twin, [*forced, *read_at_once(forced)], "twin")
        if self.host is not None:
            self.host.stop()
        return found

    def run_variants(self) -> Iterator[tuple[str, Capture | EngineError]]:
        """What each of the variants gives, fed the truth's tokens, or the error that ended it."""
        truth = self.capture
        forced = [msgspec.structs.replace(c.force(truth.continuation(c.id)), batch=0) for c in self.cases]
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

    def _take(self, role: Role, cases: list[Case], name: str) -> Capture:
        scratch = self.folder / name
        if self.store is None or role.key is None:
            return self._run(role.engine, cases, scratch, name)
        return self.store.take(role.key(cases), lambda out: self._run(role.engine, cases, out, name), scratch=scratch)

    def _run(self, engine: Engine, cases: list[Case], out: Path, name: str) -> Capture:
        if self.progress:
            self.progress(f"starting {getattr(engine, 'name', 'reference')}", 0, 0)
        try:
            engine.open()
            self.starts[name] = self.starts.get(name, 0) + 1
            return engine.run(cases, points=Selection(), out=out, progress=self.progress)
        finally:
            engine.close()
