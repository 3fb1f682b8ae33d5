"""All that is known around one point that differs: both sides' rows, the reference's other points, config, weights.

Hypotheses are tested on a scene. What they compute comes from the reference's own recorded tensors, so that nothing
has to be run again: not the model, and not the engine.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch

from paritykit.captures.manifest import Point, leading_points, point_key, split_key
from paritykit.captures.reader import Capture
from paritykit.comparison.align import rule_rows
from paritykit.comparison.tolerance import Tolerance
from paritykit.mapping.rules import Rule
from paritykit.mapping.transform import flat

T = TypeVar("T")
ReadTensor = Callable[[str], torch.Tensor | None]
"""Gives a tensor of the checkpoint by its name there; None where there is none."""
LAYER = re.compile(r"^(.*?\.(\d+))(?:\.|$)")
ROW_BUDGET = 1024
"""Positions that hypotheses are held against: enough to tell them apart, and few enough to be quick."""


class Scene:
    """One point of the reference, ``point``, where the candidate differs; ``located`` is the module to blame.

    Rows are ``[positions, features]``, one for each position of a case from 0 on, in the reference's column order.
    ``allowed`` is how far both sides may be apart there, ``floor`` what noise there is, where that was measured.
    """

    def __init__(
        self,
        *,
        reference: Capture,
        candidate: Capture,
        rules: Mapping[str, Rule],
        point: str,
        located: str,
        cases: Iterable[str],
        allowed: Tolerance,
        floor: float = 0.0,
        config: Mapping[str, Any] | None = None,
        read: ReadTensor | None = None,
    ) -> None:
        self.reference_capture, self.candidate_capture = reference, candidate
        self.rules, self.point, self.located = rules, point, located
        self.allowed, self.floor = allowed, floor
        self.config: Mapping[str, Any] = config or {}
        self._read = read
        self._known: dict[Any, Any] = {}
        self._limits: dict[str, int] = {}
        self.fits: dict[str, Any] = {}
        """What was fitted to the candidate, by name: a number, or where its features are."""
        self.cases = self._affordable(cases)
        self.module, self.port, _ = split_key(point)

    def cut(self, limits: Mapping[str, int]) -> Scene:
        """The same with some cases alone, so many positions of each. What is fitted there is known here too."""
        found = copy.copy(self)
        found._known, found._limits, found.cases = {}, dict(limits), list(limits)
        return found

    @property
    def whole(self) -> bool:
        """Whether all positions of the cases are looked at."""
        return not self._limits

    @cached_property
    def points(self) -> dict[str, Point]:
        """The reference's points, in order of execution."""
        return leading_points(self.reference_capture.manifest.points)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 where the reference is, float32 otherwise."""
        return torch.float64 if self.points[self.point].dtype == "float64" else torch.float32

    @cached_property
    def layer(self) -> str:
        """Path of the decoder layer that the point is in; empty where it is in none."""
        found = LAYER.match(self.module) or LAYER.match(self.located)
        return found[1] if found else ""

    @property
    def layer_number(self) -> int | None:
        """The number of that layer."""
        return int(self.layer.rpartition(".")[2]) if self.layer else None

    @property
    def ranks(self) -> int:
        """How many ranks of the candidate share a layer."""
        return self.candidate_capture.manifest.side.parallel.get("tensor_parallel_size", 1)

    def once(self, name: Any, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for this scene."""
        if name not in self._known:
            self._known[name] = make()
        found: T = self._known[name]
        return found

    def kind(self, module: str) -> str:
        """Class name of a module of the reference; empty for one that recorded nothing."""
        return next((p.kind for p in self.points.values() if p.module == module), "")

    def width(self, key: str) -> int:
        """Features of a point of the reference, 0 where there is none."""
        return math.prod(self.points[key].row) if key in self.points else 0

    def length(self, case: str) -> int:
        """Positions of a case that are looked at, from 0 on."""
        positions = self.reference_capture.cases[case].positions
        return min(positions, self._limits.get(case, positions))

    def prompt(self, case: str) -> int:
        """Length of a case's prompt: positions from there on are decoded."""
        return len(self.reference_capture.cases[case].tokens)

    def tokens(self, case: str) -> torch.Tensor:
        """The token at every position, ``[positions]``."""
        found = [*self.reference_capture.cases[case].tokens, *self.reference_capture.continuation(case)]
        return torch.tensor(found[: self.length(case)])

    def reference(self, key: str, case: str) -> torch.Tensor:
        """The reference's rows of a point; NaN at positions that it has not. KeyError for no such point."""
        return self.once(("reference", key, case), lambda: self._reference(key, case))

    def candidate(self, key: str, case: str) -> torch.Tensor:
        """The candidate's rows for a point of the reference; NaN at positions that it has not. KeyError for no rule."""
        return self.once(("candidate", key, case), lambda: self._candidate(key, case))

    def present(self, key: str, case: str) -> torch.Tensor:
        """Which positions the candidate has, bool ``[positions]``."""
        found = torch.zeros(self.length(case), dtype=torch.bool)
        for start, end in self._stretches(key, case):
            found[start:end] = True
        return found

    def on_rank(self, key: str, case: str, rank: int) -> torch.Tensor:
        """What one rank of the candidate holds under its own name for a point, its own width, all its positions."""
        rows = self.candidate_capture.rows(self.rules[key].candidate, case, rank=rank)
        return flat(rows).to(self.dtype)

    def rerouted(self, case: str) -> torch.Tensor:
        """Positions that the candidate sent to other experts before the point, from router logits that both show.

        Bool ``[positions]``. There rounding alone makes another output, if two experts were nearly tied.
        """
        found = torch.zeros(self.length(case), dtype=torch.bool)
        routers: dict[str, int] = self.reference_capture.manifest.facts.get("routers", {})
        before = list(self.points)[: list(self.points).index(self.point)]
        for router, count in routers.items():
            if router in before and router in self.rules:
                ours, theirs = (rows.topk(count).indices.sort().values for rows in self._both(router, case))
                found |= (ours != theirs).any(1)
        return found

    def _both(self, key: str, case: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.reference(key, case).nan_to_num(), self.candidate(key, case).nan_to_num()

    def input_of(self, module: str, case: str) -> torch.Tensor:
        """What the reference fed a module with."""
        return self.reference(point_key(module, port="input"), case)

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter of the reference by its name there, as the checkpoint holds it; None where it has none."""
        return self.once(("parameter", name), lambda: self._parameter(name))

    def tensors_of(self, name: str) -> list[str]:
        """The checkpoint's tensors that a parameter of the reference is made of."""
        known: dict[str, str] = self.reference_capture.manifest.facts.get("parameters", {})
        return [t for t, p in known.items() if p == name] or ([] if known else [name])

    def tensor(self, name: str) -> torch.Tensor | None:
        """A tensor of the checkpoint by its name there, in the scene's dtype, rounded as the reference rounds it."""
        found = self._read(name) if self._read else None
        rounded = self.reference_capture.manifest.side.args.get("weights_dtype")
        if found is not None and rounded and found.is_floating_point():
            found = found.to(getattr(torch, rounded))
        return None if found is None else found.to(self.dtype)

    def _parameter(self, name: str) -> torch.Tensor | None:
        names = self.tensors_of(name)
        return self.tensor(names[0]) if len(names) == 1 else None

    def _reference(self, key: str, case: str) -> torch.Tensor:
        spans = self.reference_capture.spans(self.points[key], case)
        rows = flat(self.reference_capture.rows(key, case)).to(self.dtype)
        positions = self.reference_capture.cases[case].positions
        if len(rows) == positions:
            return rows[: self.length(case)]
        found = torch.full((positions, self.width(key)), math.nan, dtype=self.dtype)
        found[[p for s in spans for p in range(s.position, s.position + s.length)]] = rows
        return found[: self.length(case)]

    def _candidate(self, key: str, case: str) -> torch.Tensor:
        found = torch.full((self.length(case), self.width(key)), math.nan, dtype=self.dtype)
        for start, end in self._stretches(key, case):
            rows = rule_rows(self.rules[key], self.candidate_capture, case, start, end - start)
            found[start:end] = rows[: max(self.length(case) - start, 0)]
        return found

    def _stretches(self, key: str, case: str) -> list[tuple[int, int]]:
        spans = self.candidate_capture.spans(self.candidate_capture.point(self.rules[key].candidate), case)
        return [(s.position, s.position + s.length) for s in spans]

    def _affordable(self, cases: Iterable[str]) -> list[str]:
        """As many of the cases that the point has any position of as fit the budget, the first in any case."""
        found: list[str] = []
        left = ROW_BUDGET
        for case in cases:
            spans = self.reference_capture.spans(self.points[self.point], case)
            if spans and (not found or self.length(case) <= left):
                found.append(case)
                left -= self.length(case)
        return found
