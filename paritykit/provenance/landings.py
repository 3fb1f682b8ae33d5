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

    More than one where a parameter's axis runs over two axes of the tensor at once.
    """
    found = _matched(box, shape)
    if found is not None:
        yield found
        return
    axis = max((k for k, s in enumerate(box.spans) if s.count > 1), key=lambda k: (abs(box.strides[k]), -k))
    span = box.spans[axis]
    for i, at in enumerate(span.places()):
        spans = (*box.spans[:axis], Span(at, 1), *box.spans[axis + 1 :])
        strides = (*box.strides[:axis], 0, *box.strides[axis + 1 :])
        yield from to_landings(Box(spans, box.label, box.base + i * box.strides[axis], strides), shape)


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
    for axis, unit in enumerate(units(shape)):
        step, rest = divmod(stride, unit)
        if step and not rest and 0 <= start[axis] + step * (count - 1) < shape[axis]:
            return axis
    return None
