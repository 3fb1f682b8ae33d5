"""Fused and padded parameters as strips: which tensor fills which part, on each rank.

A strip runs along the one axis that several tensors share. In a stack of experts it shows one expert, for all that are
filled alike.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from paritykit.provenance.names import NUMBER, pattern
from paritykit.reports.landings import LONGEST, is_wrong, joined, ranges, relative
from paritykit.reports.wording import shorten
from paritykit.results import WeightRow

PARTS = 240
PARTS_OF_BAR = 24
RANKS = 8
TAIL = 0.06
_AXIS = re.compile(r"(\d{1,15})(?::(\d{1,15}))?|:")
_PLAIN = ("weight", "bias")

Range = tuple[int, int] | None
"""From and to along an axis; None for all of it."""
Sizes = dict[tuple[str, int], int]
"""How far parameters of one pattern reach along an axis."""


class Part(NamedTuple):
    """A part of a bar: ``kind`` is ``tensor``, ``wrong``, ``padding`` or ``unwritten``, ``percent`` its width."""

    kind: str
    label: str
    source: str
    title: str
    percent: float


class Bar(NamedTuple):
    """A parameter on one rank."""

    rank: int
    parts: tuple[Part, ...]


class Strip(NamedTuple):
    """Parameters that are filled alike; ``more`` ranks are not shown."""

    name: str
    bars: tuple[Bar, ...]
    more: int

    @property
    def wrong(self) -> bool:
        """Whether something is wrong with a part."""
        return any(part.kind in ("unwritten", "wrong") for bar in self.bars for part in bar.parts)


class _Box(NamedTuple):
    row: WeightRow
    axes: tuple[Range, ...]


def strips_of(rows: Iterable[WeightRow]) -> tuple[list[Strip], int]:
    """Strips of every parameter with more than one part, what is wrong first, and how many are not shown."""
    boxes: dict[str, list[_Box]] = defaultdict(list)
    unwritten: set[str] = set()
    for row in rows:
        if row.parameter and not row.tensor:
            unwritten.add(row.parameter)
        elif row.parameter and (axes := _parse(row.target)) is not None:
            boxes[row.parameter].append(_Box(row, axes))
    alike: dict[object, list[tuple[str, int | None]]] = defaultdict(list)
    drawn: dict[object, list[Bar]] = {}
    sizes: Sizes = {}
    # Those with a gap come last, when the size of their like in other layers is known.
    for parameter, found in sorted(boxes.items(), key=lambda item: item[0] in unwritten):
        for index, bars in _bars(found, sizes, unwritten=parameter in unwritten):
            apart = parameter if parameter in unwritten or len(parameter) > LONGEST else pattern(parameter)
            key = (apart, len(NUMBER.findall(parameter)), index is None, tuple(bars))
            alike[key].append((parameter, index))
            drawn[key] = bars
    strips = [_strip(alike[key], bars) for key, bars in drawn.items()]
    strips.sort(key=lambda s: not s.wrong)
    return _few(strips)


def _few(strips: list[Strip]) -> tuple[list[Strip], int]:
    room, shown = PARTS, 0
    for strip in strips:
        room -= sum(len(bar.parts) for bar in strip.bars)
        if room < 0:
            break
        shown += 1
    return strips[:shown], len(strips) - shown


def _strip(places: list[tuple[str, int | None]], bars: list[Bar]) -> Strip:
    indexes = sorted({index for _, index in places if index is not None})
    name = joined(list(dict.fromkeys(parameter for parameter, _ in places)))
    return Strip(name + (f"[{ranges(indexes)}]" if indexes else ""), tuple(bars[:RANKS]), max(0, len(bars) - RANKS))


def _parse(target: str) -> tuple[Range, ...] | None:
    """The axes of ``[0:64, :]``; None for a text that is no plain box."""
    if not (target.startswith("[") and target.endswith("]")):
        return None
    found = [_AXIS.fullmatch(text) for text in target[1:-1].split(", ")]
    axes: list[Range] = []
    for match in found:
        if match is None:
            return None
        start, stop = match[1], match[2]
        axes.append((int(start), int(stop) if stop else int(start) + 1) if start else None)
    return tuple(axes)


def _bars(boxes: list[_Box], sizes: Sizes, *, unwritten: bool) -> Iterable[tuple[int | None, list[Bar]]]:
    """The bars of one parameter over its ranks, or of each place along a leading axis of experts."""
    partial = sorted({axis for box in boxes for axis, place in enumerate(box.axes) if place is not None})
    stacked = bool(partial) and partial[0] == 0 and all(b.axes[0] and b.axes[0][1] - b.axes[0][0] == 1 for b in boxes)
    if len(partial) == 1 and not (stacked and len(boxes) > 1):
        yield from _several(None, _along(boxes, partial[0], sizes, unwritten=unwritten))
    elif len(partial) == 2 and stacked:
        by_index: dict[int, list[_Box]] = defaultdict(list)
        for box in boxes:
            by_index[box.axes[0][0] if box.axes[0] else 0].append(box)
        for index, found in by_index.items():
            yield from _several(index, _along(found, partial[1], sizes, unwritten=unwritten))


def _several(index: int | None, bars: list[Bar]) -> Iterable[tuple[int | None, list[Bar]]]:
    if any(len(bar.parts) > 1 for bar in bars) and all(len(bar.parts) <= PARTS_OF_BAR for bar in bars):
        yield index, bars


def _along(boxes: list[_Box], axis: int, sizes: Sizes, *, unwritten: bool) -> list[Bar]:
    """One bar for each rank. All ranks hold a parameter of one size, so the widest says where the others are padded."""
    unit = next((b.row.elements // (p[1] - p[0]) for b in boxes if (p := b.axes[axis]) and p[1] > p[0]), 0)
    spans: dict[int, list[tuple[int, int, WeightRow]]] = defaultdict(list)
    for row, axes in boxes:
        start, stop = axes[axis] or (0, row.elements // unit if unit else 1)
        spans[row.rank].append((start, stop, row))
    size = max(stop for found in spans.values() for _, stop, _ in found)
    like = (pattern(boxes[0].row.parameter), axis)
    if unwritten:
        size = max(size, sizes.get(like, 0))
    else:
        sizes[like] = size
    whole = any(box.axes[axis] is None for box in boxes)
    gap = "unwritten" if unwritten else "padding"
    bars = []
    for rank, found in sorted(spans.items()):
        ordered = sorted(found, key=lambda span: span[:2])
        lone = len(spans) == 1 and len(found) == 1
        bars.append(Bar(rank, _parts(ordered, size, gap=gap, open_end=not whole and (lone or unwritten))))
    return bars


def _parts(spans: list[tuple[int, int, WeightRow]], size: int, *, gap: str, open_end: bool) -> tuple[Part, ...]:
    """The parts in order with what lies between; ``open_end`` where an unknown rest follows unless a hole was seen."""
    told: list[tuple[str, str, str, str, float]] = []
    position = 0
    for start, stop, row in spans:
        if start > position:
            told.append((gap, gap, "", f"{gap}: {position}:{start}", start - position))
        label = _label(row)
        kind = "wrong" if is_wrong(row) else "tensor"
        told.append((kind, label, row.source, f"{label} {row.source} fills {start}:{stop}", stop - start))
        position = max(position, stop)
    if position < size:
        told.append((gap, gap, "", f"{gap}: {position}:{size}", size - position))
    elif open_end and all(kind != gap for kind, *_ in told):
        told.append((gap, gap, "", f"{gap}: from {position} to the end, its size is not recorded", size * TAIL))
    total = sum(width for *_, width in told) or 1
    return tuple(
        Part(kind, shorten(label, 40), shorten(source, 60), shorten(title, 200), round(100 * width / total, 2))
        for kind, label, source, title, width in told
    )


def _label(row: WeightRow) -> str:
    """A tensor's name as far as it tells parts of a parameter from each other: ``q_proj``."""
    steps = relative(row.tensor, to=row.parameter).split(".")
    steps = steps if len(steps) > 1 else row.tensor.split(".")[-2:]
    steps = steps[:-1] if len(steps) > 1 and steps[-1] in _PLAIN else steps
    while len(steps) > 1 and steps[0].isdecimal():
        steps = steps[1:]
    return ".".join(steps)
