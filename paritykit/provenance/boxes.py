"""From an array of addresses to the few boxes it is made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paritykit.provenance.weightmap import Span, Spans

Ints = npt.NDArray[np.int64]
PERIODS = range(2, 129)
MOST = 4096
"""More boxes along one axis than this are no layout: they are given as one, scattered."""


class Box(NamedTuple):
    """Places in an array where the address is ``base + sum(stride * index)``, and the label is the same.

    ``regular`` is false for a box whose addresses follow no such rule.
    """

    spans: Spans
    label: int
    base: int
    strides: tuple[int, ...]
    regular: bool = True


def find_boxes(addresses: Ints, labels: Ints) -> list[Box]:
    """Boxes that cover ``addresses`` exactly, each affine and of one label; ``labels`` has the same shape.

    Cut along the axis that needs the fewest cuts, then each piece again, until every piece is affine.
    """
    whole = tuple(Span(0, n) for n in addresses.shape)
    return list(_split(addresses, labels, whole))


def _split(a: Ints, labels: Ints, spans: Spans) -> Iterator[Box]:
    cuts = {axis: _segments(a, labels, axis) for axis in range(a.ndim) if a.shape[axis] > 1}
    needed = {axis: found for axis, found in cuts.items() if len(found) > 1}
    if not needed:
        if _affine(a):
            yield _box(a, labels, spans)
            return
        axis = int(np.argmax(a.shape))
        for i in range(a.shape[axis]):
            yield from _piece(a, labels, spans, axis, slice(i, i + 1))
        return
    axis, segments = min(needed.items(), key=lambda item: len(item[1]))
    period = _period(a, labels, axis)
    if 0 < period < len(segments):
        for first in range(period):
            yield from _piece(a, labels, spans, axis, slice(first, None, period))
    elif len(segments) > MOST and (labels == labels[(0,) * a.ndim]).all():
        yield _box(a, labels, spans)._replace(regular=False)
    else:
        if len(segments) > MOST:
            axis, segments = next((k, found) for k in range(a.ndim) if len(found := _blocks(labels, k)) > 1)
        for start, stop in segments:
            yield from _piece(a, labels, spans, axis, slice(start, stop))


def _piece(a: Ints, labels: Ints, spans: Spans, axis: int, part: slice) -> Iterator[Box]:
    index = (*[slice(None)] * axis, part)
    old, (start, stop, step) = spans[axis], part.indices(a.shape[axis])
    new = Span(old.start + old.step * start, len(range(start, stop, step)), old.step * step)
    yield from _split(a[index], labels[index], (*spans[:axis], new, *spans[axis + 1 :]))


def _segments(a: Ints, labels: Ints, axis: int) -> list[tuple[int, int]]:
    """Runs along ``axis`` in which the label stays and the address grows by the same amounts, as (start, stop)."""
    others = tuple(k for k in range(a.ndim) if k != axis)
    joined = (np.diff(labels, axis=axis) == 0).all(axis=others)
    step = np.diff(a, axis=axis)
    steady = (np.diff(step, axis=axis) == 0).all(axis=others)
    if joined.all() and steady.all():
        return [(0, a.shape[axis])]
    return _runs(joined.tolist(), steady.tolist())


def _runs(joined: list[bool], steady: list[bool]) -> list[tuple[int, int]]:
    """``joined[i]``: i and i + 1 may be in one run; ``steady[i]``: so do the steps before and after i + 1 agree.

    A pair is not joined across a jump if the second starts a longer run of its own.
    """
    n, start, found = len(joined) + 1, 0, []
    while start < n:
        stop = start + 1
        if stop < n and joined[start]:
            lonely = stop < n - 1 and not steady[start] and joined[stop]
            if not (lonely and (stop + 1 >= n - 1 or (steady[stop] and joined[stop + 1]))):
                stop += 1
                while stop < n and joined[stop - 1] and steady[stop - 2]:
                    stop += 1
        found.append((start, stop))
        start = stop
    return found


def _blocks(labels: Ints, axis: int) -> list[tuple[int, int]]:
    """Runs along ``axis`` in which the label stays, as (start, stop)."""
    others = tuple(k for k in range(labels.ndim) if k != axis)
    cuts = np.flatnonzero((np.diff(labels, axis=axis) != 0).any(axis=others)) + 1
    return list(itertools.pairwise([0, *cuts.tolist(), labels.shape[axis]]))


def _period(a: Ints, labels: Ints, axis: int) -> int:
    """The interleaving of ``a`` along ``axis``: every so many places the address grows steadily. 0 for none.

    At least three times, since any two places are evenly spaced. One line is looked at before the whole.
    """
    a, labels = np.moveaxis(a, axis, 0), np.moveaxis(labels, axis, 0)
    first = (slice(None), *[slice(1)] * (a.ndim - 1))
    for period in PERIODS:
        if 3 * period > len(a):
            return 0
        if _steady(a[first], labels[first], period) and _steady(a, labels, period):
            return period
    return 0


def _steady(a: Ints, labels: Ints, period: int) -> bool:
    step = a[period:] - a[:-period]
    return bool((labels[period:] == labels[:-period]).all() and (step[period:] == step[:-period]).all())


def _strides(a: Ints) -> tuple[int, ...]:
    origin = (0,) * a.ndim
    return tuple(int(a[(*origin[:k], 1, *origin[k + 1 :])] - a[origin]) if a.shape[k] > 1 else 0 for k in range(a.ndim))


def _affine(a: Ints) -> bool:
    expected = np.full((1,) * a.ndim, a[(0,) * a.ndim])
    for axis, stride in enumerate(_strides(a)):
        shape = [1] * a.ndim
        shape[axis] = -1
        expected = expected + (np.arange(a.shape[axis], dtype=np.int64) * stride).reshape(shape)
    return bool((a == expected).all())


def _box(a: Ints, labels: Ints, spans: Spans) -> Box:
    origin = (0,) * a.ndim
    return Box(spans, int(labels[origin]), int(a[origin]), _strides(a))
