"""From boxes of flat addresses to landings: which axis of a tensor runs along which of a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator

from paritykit.provenance.boxes import Box
from paritykit.provenance.weightmap import Span, Spans


def units(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Flat distance of neighbours along each axis of a contiguous tensor."""
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def place(offset: int, shape: tuple[int, ...]) -> list[int]:
    """The index of a flat offset."""
    index = []
    for unit in units(shape):
        index.append(offset // unit)
        offset %= unit
    return index


def to_landings(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[Spans, Spans, tuple[int, ...]]]:
    """The box as (source spans, target spans, axes) of a tensor of ``shape``; ``box.base`` is a flat offset into it.

    More than one where a parameter's axis runs over two axes of the tensor at once, or two run along one of it.
    """
    found = _matched(box, shape)
    if found is not None:
        yield found
        return
    running = [k for k, s in enumerate(box.spans) if s.count > 1]
    start = place(box.base, shape)
    long = [k for k in running if _run(box.strides[k], box.spans[k].count, start, shape) < box.spans[k].count]
    axis = long[0] if long else max(running, key=lambda k: (abs(box.strides[k]), -k))
    span, stride, done = box.spans[axis], box.strides[axis], 0
    while done < span.count:
        base = box.base + done * stride
        run = _run(stride, span.count - done, place(base, shape), shape) if long else 1
        piece = Span(span.start + span.step * done, run, span.step if run > 1 else 1)
        yield from to_landings(box._replace(spans=(*box.spans[:axis], piece, *box.spans[axis + 1 :]), base=base), shape)
        done += run


def _matched(box: Box, shape: tuple[int, ...]) -> tuple[Spans, Spans, tuple[int, ...]] | None:
    start = place(box.base, shape)
    source = [Span(i, 1) for i in start]
    axes = []
    for span, stride in zip(box.spans, box.strides, strict=True):
        axis = -1 if span.count == 1 else _axis(stride, span.count, start, shape)
        if axis is None or (axis >= 0 and axis in axes):
            return None
        if axis >= 0:
            source[axis] = Span(start[axis], span.count, stride // units(shape)[axis])
        axes.append(axis)
    return tuple(source), box.spans, tuple(axes)


def _axis(stride: int, count: int, start: list[int], shape: tuple[int, ...]) -> int | None:
    """The axis along which ``count`` steps of ``stride`` stay inside the tensor."""
    return next((k for k in range(len(shape)) if _inside(stride, k, start, shape) >= count), None)


def _run(stride: int, count: int, start: list[int], shape: tuple[int, ...]) -> int:
    """How many of ``count`` places, ``stride`` apart, lie along one axis of the tensor; at least one does."""
    return min(count, max(_inside(stride, k, start, shape) for k in range(len(shape)))) if shape else 1


def _inside(stride: int, axis: int, start: list[int], shape: tuple[int, ...]) -> int:
    """Places from ``start``, ``stride`` apart, before they leave the tensor along ``axis``; one if they run askew."""
    step, rest = divmod(stride, units(shape)[axis])
    if rest or not step:
        return 1
    return ((shape[axis] - 1 - start[axis]) // step if step > 0 else start[axis] // -step) + 1
