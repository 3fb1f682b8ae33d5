"""What a stretch of memory holds, as pieces: which places were filled from which places of which tensor.

Both sides of a piece are strided layouts, so that a copy of a view of any shape is one piece, however large. Only what
is no such copy (rows in any order, say) is spelled out element by element, and put into pieces again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paritykit.provenance.boxes import Box, find_boxes
from paritykit.provenance.cells import Cells
from paritykit.provenance.landings import to_landings
from paritykit.provenance.weightmap import Span, Spans

Ints = npt.NDArray[np.int64]
UNWRITTEN, CONSTANT = -1, -2
"""Labels of what no tensor explains: never written, written without regard to any tensor."""


class Layout(NamedTuple):
    """A view of a stretch of memory, in elements from its start."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One past the last element's place; strides of views never run downwards."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def dense(self) -> bool:
        """Whether every place from the first to the last belongs to the view, once."""
        return self.end - self.offset == self.size and 0 not in [
            s for n, s in zip(self.shape, self.strides, strict=True) if n > 1
        ]

    def part(self, spans: Spans) -> Layout:
        """The layout of a box of the view."""
        first = sum(s.start * stride for s, stride in zip(spans, self.strides, strict=True))
        steps = tuple(s.step * stride for s, stride in zip(spans, self.strides, strict=True))
        return Layout(self.offset + first, tuple(s.count for s in spans), steps)

    def of(self, memory: Ints) -> Ints:
        """The view of an array that stands for the whole stretch."""
        strides = [s * memory.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(memory[self.offset :], self.shape, strides)


def plain(shape: Sequence[int]) -> Layout:
    """The layout of a contiguous tensor that fills its memory."""
    return Layout(0, tuple(shape), tuple(math.prod(shape[k + 1 :]) for k in range(len(shape))))


class Piece(NamedTuple):
    """Places ``target``, filled from the tensor (and change) ``label`` at ``base + sum(stride * index)``."""

    target: Layout
    label: int
    base: int
    strides: tuple[int, ...]


class Contents:
    """What ``size`` elements of memory hold."""

    def __init__(self, size: int, pieces: Iterable[Piece] = ()) -> None:
        self.size = size
        self._pieces = list(pieces)

    @property
    def labels(self) -> set[int]:
        """Labels of the tensors that something of is in it."""
        return {p.label for p in self._pieces if p.label >= 0}

    def write(self, target: Layout, boxes: Iterable[Box]) -> None:
        """``target`` holds ``boxes`` (in its own places) from now on."""
        if target.size:
            self._pieces = [p for p in self._pieces if not _hidden(p.target, target)]
            self._pieces += [Piece(target.part(b.spans), b.label, b.base, _steps(b)) for b in boxes]

    def read(self, view: Layout) -> list[Box]:
        """What ``view`` holds, as boxes of its places."""
        if not view.size:
            return []
        repeated = [k for k, (n, s) in enumerate(zip(view.shape, view.strides, strict=True)) if n > 1 and not s]
        if repeated:
            once = view._replace(shape=tuple(1 if k in repeated else n for k, n in enumerate(view.shape)))
            return [_repeated(box, view.shape, repeated) for box in self.read(once)]
        near = [p for p in self._pieces if p.target.offset < view.end and view.offset < p.target.end]
        if len(near) == 1 and near[0].target.dense and _within(view, near[0].target):
            return list(_through(view, near[0]))
        if view.dense and all(_within(p.target, view) for p in near):
            boxes = [b for p in near for b in _onto(p, view)]
            cells = Cells((b.spans for b in boxes), view.shape)
            if cells.counts.size and cells.counts.max(initial=0) <= 1:
                return _merged(boxes) + [Box(s, UNWRITTEN, 0, (0,) * len(s)) for s in cells.where(cells.counts == 0)]
        return self._spelled(view)

    def _spelled(self, view: Layout) -> list[Box]:
        addresses, labels = self.spell(view)
        return find_boxes(addresses, labels)

    def spell(self, view: Layout) -> tuple[Ints, Ints]:
        """Addresses and labels of every element of ``view``."""
        addresses = np.zeros(self.size, dtype=np.int64)
        labels = np.full(self.size, UNWRITTEN, dtype=np.int64)
        for piece in self._pieces:
            piece.target.of(labels)[...] = piece.label
            piece.target.of(addresses)[...] = spread(piece.target.shape, piece.base, piece.strides)
        return view.of(addresses).copy(), view.of(labels).copy()


def spread(shape: tuple[int, ...], base: int, strides: tuple[int, ...]) -> Ints:
    """``base + sum(stride * index)`` at every place of a shape."""
    found = np.full(shape, base, dtype=np.int64)
    for axis, (count, stride) in enumerate(zip(shape, strides, strict=True)):
        found += (np.arange(count) * stride).reshape([-1 if k == axis else 1 for k in range(len(shape))])
    return found


def _merged(boxes: list[Box]) -> list[Box]:
    """Neighbours in the view that are neighbours in the tensor too, made one box."""
    found: list[Box] = []
    for box in sorted(boxes, key=lambda b: tuple(s.low for s in b.spans)):
        joined = _join(found[-1], box) if found else None
        if joined is None:
            found.append(box)
        else:
            found[-1] = joined
    return found


def _join(a: Box, b: Box) -> Box | None:
    apart = [k for k, (s, t) in enumerate(zip(a.spans, b.spans, strict=True)) if s != t]
    if a.label != b.label or len(apart) != 1:
        return None
    k = apart[0]
    s, t = a.spans[k], b.spans[k]
    steps = {c.strides[k] for c in (a, b) if c.spans[k].count > 1} or {b.base - a.base}
    others = all(a.strides[j] == b.strides[j] for j in range(len(a.spans)) if j != k)
    if len(steps) != 1 or not others or {s.step, t.step} != {1} or t.start != s.start + s.count:
        return None
    stride = steps.pop()
    if a.label >= 0 and b.base != a.base + s.count * stride:
        return None
    spans = (*a.spans[:k], Span(s.start, s.count + t.count), *a.spans[k + 1 :])
    return a._replace(spans=spans, strides=(*a.strides[:k], stride, *a.strides[k + 1 :]))


def _repeated(box: Box, shape: tuple[int, ...], axes: list[int]) -> Box:
    """The same places again and again along ``axes``."""
    spans = tuple(Span(0, shape[k]) if k in axes else s for k, s in enumerate(box.spans))
    return box._replace(spans=spans, strides=tuple(0 if k in axes else s for k, s in enumerate(box.strides)))


def _steps(box: Box) -> tuple[int, ...]:
    """A box's address step along each axis, 0 for one place."""
    return tuple(s if span.count > 1 else 0 for s, span in zip(box.strides, box.spans, strict=True))


def _hidden(old: Layout, new: Layout) -> bool:
    """Whether ``new`` surely covers ``old``."""
    return old == new or (new.dense and _within(old, new))


def _within(inner: Layout, outer: Layout) -> bool:
    return outer.offset <= inner.offset and inner.end <= outer.end


def _relate(inner: Layout, outer: Layout) -> Iterator[tuple[Spans, Spans, tuple[int, ...]]]:
    """Boxes of ``outer``, which is dense, and the boxes of ``inner`` that lie there, with the latter's axes.

    ``axes[k]`` is the axis of ``outer`` along which axis ``k`` of ``inner`` runs, -1 for one place.
    """
    order = sorted(range(len(outer.shape)), key=lambda k: (-outer.strides[k], outer.shape[k] == 1))
    shape = tuple(outer.shape[k] for k in order)
    whole = tuple(Span(0, n) for n in inner.shape)
    for found, own, axes in to_landings(Box(whole, 0, inner.offset - outer.offset, inner.strides), shape):
        spans: list[Span] = [Span(0, 1)] * len(order)
        for place, k in enumerate(order):
            spans[k] = found[place]
        yield tuple(spans), own, tuple(order[a] if a >= 0 else -1 for a in axes)


def _through(view: Layout, piece: Piece) -> Iterator[Box]:
    """A view that lies within one piece, as boxes of the view."""
    if piece.label < 0:
        yield Box(tuple(Span(0, n) for n in view.shape), piece.label, 0, (0,) * len(view.shape))
        return
    for inside, own, axes in _relate(view, piece.target):
        base = piece.base + sum(s.start * stride for s, stride in zip(inside, piece.strides, strict=True))
        steps = tuple(piece.strides[a] * inside[a].step if a >= 0 else 0 for a in axes)
        yield Box(own, piece.label, base, steps)


def _onto(piece: Piece, view: Layout) -> Iterator[Box]:
    """A piece that lies within a dense view, as boxes of the view."""
    for spans, own, axes in _relate(piece.target, view):
        base = piece.base + sum(s.start * stride for s, stride in zip(own, piece.strides, strict=True))
        steps = [0] * len(view.shape)
        for k, axis in enumerate(axes):
            if axis >= 0:
                steps[axis] = piece.strides[k] * own[k].step
        yield Box(spans, piece.label, base, tuple(steps))
