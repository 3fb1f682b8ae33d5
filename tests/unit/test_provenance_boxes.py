"""Boxes cover an array of addresses exactly, reproduce it, and are as few as its layout allows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.provenance import boxes
from paritykit.provenance.boxes import Box, find_boxes
from paritykit.provenance.landings import place, to_landings, units
from paritykit.provenance.weightmap import Span, size

Ints = npt.NDArray[np.int64]


def tensor(*shape: int, start: int = 0) -> Ints:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.int64).reshape(shape)


def places(box: Box) -> Ints:
    return np.stack(np.meshgrid(*[list(s.places()) for s in box.spans], indexing="ij"))


def check(addresses: Ints, labels: Ints | None = None) -> list[Box]:
    """The boxes, after seeing that they are disjoint, cover the array, and say what is in it."""
    labels = np.zeros_like(addresses) if labels is None else labels
    found = find_boxes(addresses, labels)
    times = np.zeros_like(addresses)
    for box in found:
        at = tuple(places(box))
        times[at] += 1
        steps = np.meshgrid(*[np.arange(s.count) for s in box.spans], indexing="ij")
        assert box.regular
        assert (addresses[at] == box.base + sum(k * s for k, s in zip(steps, box.strides, strict=True))).all()
        assert (labels[at] == box.label).all()
    assert (times == 1).all()
    return found


def gather_all(found: list[Box], shape: tuple[int, ...]) -> None:
    """Landings of each box reproduce it: the tensor's box, with its axes moved, is what is in the parameter's."""
    whole = tensor(*shape)
    for box in found:
        total = 0
        for source, target, axes in to_landings(box, shape):
            total += size(target)
            taken = whole[np.ix_(*[list(s.places()) for s in source])]
            running = [a for a in axes if a >= 0]
            one_sized = tuple(k for k in range(whole.ndim) if k not in running)
            assert all(source[k].count == 1 for k in one_sized)
            moved = taken.squeeze(one_sized).transpose([sorted(running).index(a) for a in running])
            steps = [
                [s.start + s.step * i - b.start for i in range(s.count)] for s, b in zip(target, box.spans, strict=True)
            ]
            index = [[n // b.step for n in step] for step, b in zip(steps, box.spans, strict=True)]
            grid = np.meshgrid(*[np.array(i) for i in index], indexing="ij")
            inside = box.base + sum(g * s for g, s in zip(grid, box.strides, strict=True))
            assert (moved.reshape([s.count for s in target]) == inside).all()
        assert total == size(box.spans)


SIZES = st.integers(1, 7)
MOVES = st.sampled_from(["transpose", "slice", "reverse", "even", "stack", "interleave", "columns", "pad", "squeeze"])


@given(st.lists(SIZES, min_size=1, max_size=3), st.lists(MOVES, max_size=4), st.data())
@settings(deadline=None, max_examples=300)
def test_any_layout_is_recovered(shape: list[int], moves: list[str], data: st.DataObject) -> None:
    made, labels, count = tensor(*shape), np.zeros(shape, dtype=np.int64), 1
    for move in moves:
        axis = data.draw(st.integers(0, made.ndim - 1))
        n = made.shape[axis]
        if move in {"stack", "interleave", "columns", "pad"}:
            other = np.zeros_like(made) if move == "pad" else tensor(*made.shape)
            other_labels = np.full_like(labels, -1 if move == "pad" else count)
            count += 1
            if move == "interleave":
                period = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
                made, labels = (interleave(a, b, axis, period) for a, b in ((made, other), (labels, other_labels)))
            else:
                made, labels = (np.concatenate(x, axis) for x in ((made, other), (labels, other_labels)))
        elif move == "squeeze":
            made, labels = made[..., None], labels[..., None]
        else:
            start = data.draw(st.integers(0, n - 1))
            index = {"slice": slice(start, None), "reverse": slice(None, None, -1), "even": slice(start, None, 2)}
            if move == "transpose":
                made, labels = made.T, labels.T
            else:
                where = (*[slice(None)] * axis, index[move])
                made, labels = made[where], labels[where]
    check(made, labels)


def interleave(one: Ints, other: Ints, axis: int, period: int) -> Ints:
    """``period`` rows of one, as many of the other, and so on."""
    parts = [np.split(a, a.shape[axis] // period, axis) for a in (one, other)]
    return np.concatenate([x for pair in zip(*parts, strict=True) for x in pair], axis)


@given(st.integers(2, 6), st.integers(1, 5), st.integers(2, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_regrouped_heads(heads: int, head_dim: int, parts: int, width: int) -> None:
    """A fused qkv of (heads, 3, head_dim) rows, put as (3, heads, head_dim) rows."""
    shape = (heads * parts * head_dim, width)
    mixed = tensor(*shape).reshape(heads, parts, head_dim, width).transpose(1, 0, 2, 3).reshape(shape)
    found = check(mixed)
    assert len(found) <= heads * parts
    gather_all(found, shape)


@pytest.mark.parametrize(("made", "shape", "most"), [
    (tensor(12, 8), (12, 8), 1),
    (tensor(12, 8).T, (12, 8), 1),
    (tensor(12, 8)[::-1, ::-1], (12, 8), 1),
    (tensor(12, 8)[3:7], (12, 8), 1),
    (tensor(12, 8)[1::2, ::3], (12, 8), 1),
    (tensor(12, 8).reshape(3, 4, 8), (12, 8), 3),
    (tensor(3, 4, 8).reshape(12, 8), (3, 4, 8), 1),
    (tensor(4, 3, 2).transpose(2, 0, 1), (4, 3, 2), 1),
    (tensor(8, 1, 4)[:, 0], (8, 1, 4), 1),
    (tensor(8, 4)[:, None], (8, 4), 1),
    (tensor(24), (24,), 1),
    (tensor(1), (1,), 1),
    (tensor(1, 1, 1), (1, 1, 1), 1),
    (np.concatenate([tensor(8, 4)[4:], tensor(8, 4)[:4]]), (8, 4), 2),
    (np.concatenate([tensor(6, 8)[:, 4:], tensor(6, 8)[:, :4]], 1), (6, 8), 2),
    (tensor(32, 4).reshape(16, 2, 4).transpose(1, 0, 2).reshape(32, 4), (32, 4), 2),
    (tensor(32, 4).reshape(2, 16, 4).transpose(1, 0, 2).reshape(32, 4), (32, 4), 2),
    (tensor(512, 2).reshape(128, 4, 2).transpose(1, 0, 2).reshape(512, 2), (512, 2), 4),
    (tensor(512, 2).reshape(4, 128, 2).transpose(1, 0, 2).reshape(512, 2), (512, 2), 4),
    (np.roll(tensor(9, 5), 1, 0), (9, 5), 2),
    (tensor(8, 4)[[0, 1, 2, 4, 3, 5, 6, 7]], (8, 4), 4),
    (tensor(4, 4).diagonal(), (4, 4), 1),
], ids=str)  # fmt: skip
def test_few_boxes(made: Ints, shape: tuple[int, ...], most: int) -> None:
    found = check(np.ascontiguousarray(made))
    assert len(found) <= most
    gather_all(found, shape)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=60)
def test_shards_are_one_box_on_each_rank(ranks: int, rows: int, columns: int, axis: int) -> None:
    whole = tensor(rows * ranks, columns * ranks)
    for piece in np.split(whole, ranks, axis):
        assert len(check(piece)) == 1


@pytest.mark.parametrize("period", [2, 3, 5, 64, 128])
def test_an_interleaving_is_a_box_for_each_of_its_tensors(period: int) -> None:
    made = np.stack([tensor(3, 2)] * period, 1).reshape(-1, 2)
    labels = np.tile(np.arange(period).repeat(2).reshape(period, 2), (3, 1))
    assert len(check(made, labels)) == period


def test_fused_padded_and_interleaved() -> None:
    q, k, zeros = tensor(8, 4), tensor(4, 4), np.zeros((3, 4), dtype=np.int64)
    made = np.concatenate([q[::2], q[1::2], k, zeros])
    labels = np.repeat([0, 1, -2], [8, 4, 3])[:, None] * np.ones((1, 4), dtype=np.int64)
    assert [(b.label, b.spans[0], b.base, b.strides) for b in check(made, labels)] == [
        (0, Span(0, 4), 0, (8, 1)),
        (0, Span(4, 4), 4, (8, 1)),
        (1, Span(8, 4), 0, (4, 1)),
        (-2, Span(12, 3), 0, (0, 0)),
    ]


def test_what_is_a_function_of_two_axes_at_once_falls_apart_into_rows() -> None:
    assert len(check(np.outer(np.arange(4), np.arange(5)))) == 5


def test_two_exchanged_rows_are_runs_and_no_interleaving() -> None:
    spans = [b.spans[0] for b in check(tensor(6, 2)[[0, 2, 1, 3, 4, 5]])]
    assert {s.step for s in spans} == {1}
    assert [b.spans[0] for b in check(tensor(4, 2)[[0, 2, 1, 3]])] == [Span(0, 2), Span(2, 2)]


@pytest.mark.parametrize(("made", "shape", "most"), [
    (tensor(12, 8).reshape(-1), (12, 8), 12),
    (tensor(12, 8).reshape(-1)[::-1], (12, 8), 12),
    (tensor(12, 8).reshape(-1)[3:17], (12, 8), 3),
    (tensor(64, 3, 5, 7).reshape(64, 105), (64, 3, 5, 7), 15),
    (tensor(64, 3, 5, 7).reshape(64, 105).T, (64, 3, 5, 7), 15),
    (tensor(12, 8).reshape(24, 4), (12, 8), 24),
    (tensor(12, 8).reshape(6, 16), (12, 8), 12),
    (tensor(4, 4).diagonal(), (4, 4), 4),
    (np.zeros((3, 2), dtype=np.int64), (4, 4), 6),
], ids=lambda x: str(x) if isinstance(x, tuple) else "")  # fmt: skip
def test_few_landings_where_axes_are_joined_or_cut(made: Ints, shape: tuple[int, ...], most: int) -> None:
    found = check(np.ascontiguousarray(made))
    gather_all(found, shape)
    assert sum(len([*to_landings(b, shape)]) for b in found) <= most


@pytest.mark.parametrize("seed", range(3))
def test_a_permutation_of_a_few_rows_is_recovered(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(40)
    found = check(tensor(40, 3)[order])
    assert len(found) <= 40
    assert {b.spans[0].step for b in found} == {1}


def test_many_permuted_rows_are_one_scattered_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "MOST", 16)
    order = np.random.default_rng(0).permutation(200)
    (box,) = find_boxes(tensor(200, 3)[order], np.zeros((200, 3), dtype=np.int64))
    assert (box.regular, box.spans) == (False, (Span(0, 200), Span(0, 3)))


@pytest.mark.parametrize("axis", [0, 1])
def test_scattered_parts_keep_apart(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    monkeypatch.setattr(boxes, "MOST", 16)
    rng = np.random.default_rng(0)
    first, second = (np.moveaxis(rng.permutation(100)[:, None] * 5 + np.arange(5), 0, axis) for _ in range(2))
    labels = np.concatenate([np.zeros_like(first), np.ones_like(first)], axis)
    found = find_boxes(np.concatenate([first, second], axis), labels)
    assert [(b.label, b.spans[axis], b.regular) for b in found] == [
        (0, Span(0, 100), False),
        (1, Span(100, 100), False),
    ]


def test_scattered_where_two_labels_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "MOST", 4)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (12, 12))
    times = np.zeros((12, 12))
    for box in find_boxes(rng.permutation(144).reshape(12, 12), labels):
        times[tuple(places(box))] += 1
        assert (labels[tuple(places(box))] == box.label).all()
    assert (times == 1).all()


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_place_is_its_offset(shape: list[int], data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, int(np.prod(shape)) - 1))
    index = place(offset, tuple(shape))
    assert sum(i * u for i, u in zip(index, units(tuple(shape)), strict=True)) == offset
    assert all(0 <= i < n for i, n in zip(index, shape, strict=True))
