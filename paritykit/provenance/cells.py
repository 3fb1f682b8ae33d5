"""Counting how often places are covered by boxes, without an array of their size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from paritykit.provenance.boxes import find_boxes
from paritykit.provenance.weightmap import Span, Spans

Edges = list[list[int]]


class Cells:
    """A shape cut along every edge of ``boxes``, and how many boxes cover each cell."""

    def __init__(self, boxes: Iterable[Spans], shape: tuple[int, ...]) -> None:
        self._boxes = [*boxes]
        self._edges = [_edges(n, [b[axis] for b in self._boxes]) for axis, n in enumerate(shape)]
        self.counts: npt.NDArray[np.int64] = np.zeros([len(e) - 1 for e in self._edges], dtype=np.int64)
        for box in self._boxes:
            self.counts[np.ix_(*[self._places(axis, span) for axis, span in enumerate(box)])] += 1

    def where(self, condition: npt.NDArray[np.bool_]) -> list[Spans]:
        """Boxes of the places whose cells fulfil ``condition`` (an array like ``counts``)."""
        if not condition.any():
            return []
        if not self._edges:
            return [()]
        labels = condition.astype(np.int64)
        found = find_boxes(np.zeros_like(labels), labels)
        return [spans for box in found if box.label for spans in self._spans(box.spans)]

    def elements(self, condition: npt.NDArray[np.bool_]) -> int:
        """How many places fulfil ``condition``."""
        sizes = np.ones_like(self.counts)
        for axis, edges in enumerate(self._edges):
            shape = [1] * len(self._edges)
            shape[axis] = -1
            sizes = sizes * np.diff(edges).reshape(shape)
        return int(sizes[condition].sum())

    def _places(self, axis: int, span: Span) -> list[int]:
        edges = self._edges[axis]
        inside = set(span.places()) if abs(span.step) > 1 else range(span.low, span.low + span.count)
        return [i for i, start in enumerate(edges[:-1]) if start in inside]

    def _spans(self, cells: Spans) -> Iterator[Spans]:
        """A box of cells as boxes of places: more than one where every so many cells are not evenly spaced."""
        yield from itertools.product(*map(self._runs, self._edges, cells))

    @staticmethod
    def _runs(edges: list[int], cell: Span) -> list[Span]:
        if cell.step == 1:
            return [Span(edges[cell.start], edges[cell.last + 1] - edges[cell.start])]
        if len(edges) == edges[-1] + 1:
            return [cell]
        return [Span(edges[i], edges[i + 1] - edges[i]) for i in cell.places()]


def _edges(size: int, spans: list[Span]) -> list[int]:
    if any(abs(s.step) > 1 for s in spans):
        return list(range(size + 1))
    return sorted({0, size, *(s.low for s in spans), *(s.low + s.count for s in spans)})
