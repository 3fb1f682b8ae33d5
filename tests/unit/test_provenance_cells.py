"""Cells count as a dense array would."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.provenance.cells import Cells
from paritykit.provenance.weightmap import Span, Spans

Ints = npt.NDArray[np.int64]


@st.composite
def spans(draw: st.DrawFn, n: int) -> Span:
    step = draw(st.sampled_from([1, 1, 1, -1, 2, -2, 3]))
    start = draw(st.integers(0, n - 1))
    room = (n - 1 - start) // step if step > 0 else start // -step
    return Span(start, draw(st.integers(1, room + 1)), step)


@st.composite
def covers(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Spans]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    return shape, draw(st.lists(st.tuples(*[spans(n) for n in shape]), max_size=5))


def dense(boxes: list[Spans], shape: tuple[int, ...]) -> Ints:
    times = np.zeros(shape, dtype=np.int64)
    for box in boxes:
        times[np.ix_(*[list(s.places()) for s in box])] += 1
    return times


@given(covers(), st.integers(0, 2))
@settings(deadline=None, max_examples=300)
def test_counts_and_places_are_those_of_a_dense_array(cover: tuple[tuple[int, ...], list[Spans]], wanted: int) -> None:
    shape, boxes = cover
    cells, times = Cells(boxes, shape), dense(boxes, shape)
    condition = cells.counts == wanted
    assert cells.elements(condition) == (times == wanted).sum()
    assert (dense(cells.where(condition), shape) == (times == wanted)).all()


@pytest.mark.parametrize(("boxes", "shape", "missing"), [
    ([(Span(0, 4), Span(0, 8))], (8, 8), [(Span(4, 4), Span(0, 8))]),
    ([(Span(2, 4), Span(0, 8))], (8, 8), [(Span(0, 2), Span(0, 8)), (Span(6, 2), Span(0, 8))]),
    ([(Span(7, 4, -1),)], (8,), [(Span(0, 4),)]),
    ([(Span(0, 4, 2),)], (8,), [(Span(1, 4, 2),)]),
    ([(Span(0, 3),), (Span(4, 5),), (Span(10, 1),)], (16,), [(Span(3, 1),), (Span(9, 1),), (Span(11, 5),)]),
    ([(Span(n, 2),) for n in range(0, 20, 4)], (20,), [(Span(n, 2),) for n in range(2, 20, 4)]),
    ([], (3, 2), [(Span(0, 3), Span(0, 2))]),
    ([], (), [()]),
    ([()], (), []),
    ([], (0, 4), []),
])  # fmt: skip
def test_what_is_missing(boxes: list[Spans], shape: tuple[int, ...], missing: list[Spans]) -> None:
    cells = Cells(boxes, shape)
    assert cells.where(cells.counts == 0) == missing


def test_cells_are_few_however_large_the_shape() -> None:
    cells = Cells([(Span(r * 10**6, 10**6), Span(0, 10**5)) for r in range(4)], (5 * 10**6, 10**5))
    assert cells.counts.shape == (5, 1)
    assert cells.elements(cells.counts == 0) == 10**11
