"""Consequence: what is computed from a point, and whether that shows the point's error. Torch-free.

A point that disagrees while everything computed from it agrees stands for something else under the same name. That is
told from a small fault that is diluted, in a residual stream say: silence counts only where the error would have been
seen, see ``Flow.telling``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from paritykit.captures.manifest import CACHE_PORTS, split_key
from paritykit.diagnose.locate import Graph
from paritykit.diagnose.tree import Tree

SINKS = ("logits", *CACHE_PORTS)
"""Ports of what a model is run for: never named alike."""


def is_sink(key: str) -> bool:
    """Whether a point is what a model is run for, its logits or what it caches."""
    return split_key(key)[1] in SINKS


class Flow:
    """Which of the points that were ``compared`` (key to failed) are computed from which.

    Edges are those of the reference's graph without those that go round a point in between: where ``a`` goes into
    ``b`` and that into ``c``, ``a`` reaches ``c`` through ``b``. What holds the layers takes what was finished last.
    """

    def __init__(self, graph: Graph, tree: Tree, *, compared: Mapping[str, bool]) -> None:
        self._graph, self._compared = graph, compared
        origins = {key: graph.origins(key, compared=compared) for key in compared}
        parents = {key: self._parents(key, origins[key], tree) for key in compared}
        children: dict[str, set[str]] = defaultdict(set)
        for key, found in parents.items():
            for parent in found:
                children[parent].add(key)
        self._all = children
        self._reading: dict[str, set[str]] = defaultdict(set)
        for key in (k for k in compared if not _cached(k)):
            for cache in filter(_cached, origins[key]):
                self._reading[cache].add(key)
        self._next = {
            key: {c for c in found if found.isdisjoint(parents[c] - {key, c})} for key, found in children.items()
        }

    def _parents(self, key: str, origins: Iterable[str], tree: Tree) -> set[str]:
        found = {k for k in origins if k != key and not _cached(k)}
        if found and tree.is_outer(split_key(key)[0]) and split_key(key)[1] != "input":
            return {max(found, key=self._graph.order)}
        return found

    def after(self, key: str) -> set[str]:
        """The points computed from one directly."""
        return self._next.get(key, set())

    def around(self, key: str) -> set[str]:
        """The points that may also take it, beside what it reaches them through: residual streams do."""
        return self._all.get(key, set()) - self.after(key)

    def silent(self, failing: Collection[str]) -> set[str]:
        """Those of the ``failing`` points that nothing shows that is computed from them.

        What is computed from such a point agrees, or is such a point itself. Sinks are none, nor is what has nothing
        after it.
        """
        return self._quiet({k for k in failing if not is_sink(k) and self.after(k)})

    def alike(self, failing: Collection[str]) -> set[str]:
        """As ``silent``, with caches: what reads such a cache agrees, so that it may hold its columns in an order of
        its own, as the queries do. That must be shown: what is cached is never told as something else.
        """
        return self._quiet({k for k in failing if self._onward(k)})

    def _onward(self, key: str) -> set[str]:
        """The points computed from one directly, those that read it where it is a cache."""
        return self._reading.get(key, set()) if _cached(key) else self.after(key)

    def _quiet(self, found: set[str]) -> set[str]:
        while heard := {k for k in found if any(self._compared[c] and c not in found for c in self._onward(k))}:
            found -= heard
        return {k for k in found if _cached(k) or self.shown(k, found)}

    def shown(self, key: str, silent: Collection[str]) -> set[str]:
        """The points that agree where the error of a silent one would be seen first."""
        seen, found, todo = {key}, set[str](), [key]
        while todo:
            for child in self.after(todo.pop()) - seen:
                seen.add(child)
                if child in silent:
                    todo.append(child)
                elif not self._compared[child]:
                    found.add(child)
        return found


def _cached(key: str) -> bool:
    return split_key(key)[1] in CACHE_PORTS


def failed_anywhere(verdicts: Iterable[tuple[str, bool]]) -> dict[str, bool]:
    """Points to whether one of their cases failed.

    >>> failed_anywhere([("a", False), ("a", True), ("b", False)])
    {'a': True, 'b': False}
    """
    found: dict[str, bool] = {}
    for key, failed in verdicts:
        found[key] = failed or found.get(key, False)
    return found
