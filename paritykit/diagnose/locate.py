"""Where a difference starts: the first failing point, and whether it was introduced there or only passed on.

The reference's capture knows which point every module was fed with (its ``source``). A failing point is *inherited*
if what it was computed from failed already, otherwise *introduced*. A module's input that no module made (attention's
context, a residual sum, gate times up) was computed by the code of the module around it: that one is to blame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from paritykit.captures.manifest import Manifest, Point, leading_points, point_key
from paritykit.results import Divergence, Finding, Origin

UNMEASURED = ("shape", "mapping")
"""Metrics of findings about how points were matched: no number was measured."""


class Graph:
    """Which points each point was computed from, as seen by the reference's hooks."""

    def __init__(self, manifest: Manifest) -> None:
        self._points = leading_points(manifest.points)
        self._order = {k: n for n, k in enumerate(self._points)}
        self._parents = {p.module for p in self._points.values() if p.module}
        self._given: dict[str, list[str]] = defaultdict(list)
        """What modules around gave on of a point, by that point."""
        for key, point in self._points.items():
            if point.source and not point.port:
                self._given[point.source].append(key)

    def order(self, key: str) -> int:
        """Place of a point in execution order; after all others if it is unknown."""
        return self._order.get(key, len(self._order))

    def blame(self, key: str, *, compared: Mapping[str, bool] | None = None) -> str:
        """The module to look at when ``key`` is the first to fail (``compared``: key to failed).

        Where it should be what another point was, and that one is right, it was lost on the way.
        """
        point = self._points.get(key)
        if point is None:
            return key
        if point.source and (compared or {}).get(point.source, True):
            return self.blame(point.source, compared=compared)
        if point.port == "input":
            return self.around(point.module) or "the model's own code"
        return point.module or key

    def around(self, module: str) -> str:
        """The nearest module around ``module``; lists of layers are no modules that compute."""
        parent = module.rpartition(".")[0]
        while parent and parent not in self._parents:
            parent = parent.rpartition(".")[0]
        return parent

    def origins(self, key: str, *, compared: Mapping[str, bool]) -> list[str]:
        """The points that ``key`` was computed from, as far as they were compared (``compared``: key to failed)."""
        point = self._points.get(key)
        if point is None:
            return []
        if point.source:
            made = [k for k in (point.source, *self._handed_on(point)) if k in compared]
            return made or self.origins(point.source, compared=compared)
        if point.port != "input" and not self._inside(point.module):
            fed = point_key(point.module, port="input", call=point.call)
            if fed in compared:
                return [fed]
            if fed in self._points:
                return self.origins(fed, compared=compared)
        scope = self.around(point.module) if point.port == "input" else point.module
        found = self._earlier(scope, before=point)
        while scope and not found:  # nothing was computed there before: it was handed in from around
            scope = self.around(scope)
            found = [k for k in self._earlier(scope, before=point) if self._points[k].module != point.module]
        return found

    def _handed_on(self, point: Point) -> list[str]:
        """Modules around that gave the very tensor that ``point`` is, before it."""
        return [k for k in self._given[point.source] if self._order[k] < self._order[point.key]]

    def _inside(self, module: str) -> list[str]:
        start = f"{module}." if module else ""
        return [k for k, p in self._points.items() if p.module.startswith(start) and p.module != module]

    def _earlier(self, scope: str, *, before: Point) -> list[str]:
        """Everything inside ``scope`` that was finished before, and what those were fed with."""
        limit = self._order[before.key]
        inside = self._inside(scope)
        if before.module != scope or not before.inner:
            inside += [k for k, p in self._points.items() if p.module == scope and p.inner]
        inside = [k for k in inside if self._order[k] < limit]
        return inside + [s for k in inside if (s := self._points[k].source)]


def locate(findings: Iterable[Finding], graph: Graph) -> list[Finding]:
    """The findings in execution order, each failing one marked introduced or inherited and with whom to blame."""
    ordered = sorted(findings, key=lambda f: f.order)
    compared = {f.point: f.verdict == "fail" for f in ordered if f.metric not in UNMEASURED}
    return [_marked(f, graph, compared) for f in ordered]


def _marked(finding: Finding, graph: Graph, compared: Mapping[str, bool]) -> Finding:
    if finding.verdict != "fail":
        return finding
    inherited = any(compared.get(k, False) for k in graph.origins(finding.point, compared=compared))
    origin: Origin = "inherited" if inherited else "introduced"
    return msgspec.structs.replace(finding, origin=origin, located=graph.blame(finding.point, compared=compared))


def first_failure(findings: Iterable[Finding]) -> Finding | None:
    """The finding that ``first_divergence`` is made of; one that no number was measured for, only where all are."""
    failing = [f for f in findings if f.verdict == "fail"]
    return min(
        failing, key=lambda f: (f.metric in UNMEASURED, f.origin == "inherited", f.case != "", f.order), default=None
    )


def first_divergence(findings: Iterable[Finding]) -> Divergence | None:
    """The earliest introduced failure over all cases, or the earliest failure where none is known to be introduced.

    What is wrong with the model as a whole, in no case, comes before what it does in one.
    """
    first = first_failure(findings)
    if first is None:
        return None
    return Divergence(
        check=first.check, case=first.case, point=first.located or first.point, origin=first.origin, seen_at=first.point
    )


def find_culprits(findings: Iterable[Finding]) -> list[Divergence]:
    """The modules that are wrong on the reference's own values, in execution order, each where it first shows."""
    found: dict[str, Divergence] = {}
    for f in sorted((f for f in findings if f.local is not None and f.local.culprit), key=lambda f: f.order):
        blamed = f.located or f.point
        new = Divergence(check=f.check, case=f.case, point=blamed, origin="introduced", seen_at=f.point)
        found.setdefault(blamed, new)
    return list(found.values())
