"""A weight map learned on a small sibling, carried over to a large model of the same architecture.

What is alike but for its numbers (layers, experts) is laid out alike; sizes along each axis grow. A box of a tensor
keeps its share of the axis, or its rank's block of it; boxes of a parameter keep their order and stay adjacent. What
cannot be carried over is an error, never a guess; the real weights are compared afterwards in any case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from paritykit.errors import ParityError
from paritykit.provenance.names import numbers, pattern
from paritykit.provenance.weightmap import Gap, Landing, ParameterInfo, Span, Spans, TensorInfo, WeightMap, size

Shape = tuple[int, ...]


class ScaleError(ParityError):
    """A layout that does not carry over."""


def scale_map(
    small: WeightMap, tensors: Mapping[str, TensorInfo], parameters: Iterable[ParameterInfo], *, rank: int
) -> WeightMap:
    """The map of a model with these tensors and parameters on one rank, after that of its sibling.

    Raises ScaleError for a parameter whose boxes do not fill it as they fill the sibling's.
    """
    learned = _Learned(small, tensors, rank)
    whole = WeightMap(tensors=dict(tensors), parameters=list(parameters))
    for info in whole.parameters:
        if not info.same_as:
            landings, gaps = learned.fill(info)
            whole.landings += landings
            whole.gaps += gaps
    return whole


class _Learned:
    def __init__(self, small: WeightMap, tensors: Mapping[str, TensorInfo], rank: int) -> None:
        self._small = small
        self._tensors = tensors
        self._rank = rank
        self._names: dict[str, list[str]] = defaultdict(list)
        for name in tensors:
            self._names[pattern(name)].append(name)
        self._models: dict[str, list[ParameterInfo]] = defaultdict(list)
        for p in small.parameters:
            if not p.same_as:
                self._models[pattern(p.name)].append(p)
        self._filled: dict[str, list[Landing]] = defaultdict(list)
        for x in small.landings:
            self._filled[x.parameter].append(x)

    def fill(self, info: ParameterInfo) -> tuple[list[Landing], list[Gap]]:
        """Landings and gaps of one parameter."""
        model = self._model(info)
        if model is None:
            raise ScaleError(f"{info.name} has no like in the sibling")
        pairs = [(t, x) for x in self._filled[model.name] for t in self._tensors_like(x, model, info)]
        gaps = [g for g in self._small.gaps if g.parameter == model.name]
        placed = [self._carried(t, x, model, info) for t, x in pairs if t in self._tensors]
        landings = _adjacent(placed, [x for t, x in pairs if t in self._tensors], info)
        lost = [t for t, _ in pairs if t not in self._tensors]
        if lost or (gaps and gaps[0].kind == "unwritten"):
            rest = Gap(parameter=info.name, rank=self._rank, target=_whole(info.shape), kind="unwritten")
            return landings, [rest] if not landings else [msgspec.structs.replace(rest, tensor=lost[0] if lost else "")]
        self._check(landings, gaps, model, info)
        return landings, [self._padding(g, landings, info) for g in gaps if g.kind == "constant"]

    def _model(self, info: ParameterInfo) -> ParameterInfo | None:
        """The sibling's parameter of the same kind: its very namesake, else the last of those filled from tensors
        that the large checkpoint has."""
        alike = self._models.get(pattern(info.name), [])
        same = next((p for p in alike if p.name == info.name), None)
        fitting = [p for p in alike if all(t in self._tensors for x in self._filled[p.name][:1]
                                           for t in self._tensors_like(x, p, info)[:1])]  # fmt: skip
        if same in fitting or not fitting:
            return same
        return fitting[-1]

    def _tensors_like(self, x: Landing, model: ParameterInfo, info: ParameterInfo) -> list[str]:
        """The large checkpoint's tensors for one of the sibling's: of this layer; all experts for the first one."""
        own, old = numbers(info.name), numbers(model.name)
        found = numbers(x.tensor)
        if found[: len(old)] != old:
            return [x.tensor]
        rest = found[len(old) :]
        if not rest:
            return [_renumbered(x.tensor, own)]
        if any(rest):
            return []
        return [n for n in self._names[pattern(x.tensor)] if numbers(n)[: len(own)] == own]

    def _carried(self, tensor: str, x: Landing, model: ParameterInfo, info: ParameterInfo) -> Landing:
        small, large = self._small.tensors[x.tensor].shape, self._tensors[tensor].shape
        if len(small) != len(large):
            raise ScaleError(f"{tensor} has {len(large)} axes, and its like in the sibling {len(small)}")
        shapes = (model.shape, info.shape)
        source = tuple(self._span(x, a, (small[a], large[a]), shapes) for a in range(len(small)))
        target = list(x.target)
        for k, axis in enumerate(x.axes):
            if axis >= 0:
                target[k] = Span(x.target[k].start, source[axis].count, x.target[k].step)
        rest = numbers(tensor)[len(numbers(info.name)) :]
        if rest and x.axes and x.axes[0] == -1:
            target[0] = Span(rest[-1], 1)
        return msgspec.structs.replace(
            x, tensor=tensor, parameter=info.name, rank=self._rank, source=source, target=tuple(target)
        )

    def _span(self, x: Landing, axis: int, sizes: tuple[int, int], shapes: tuple[Shape, Shape]) -> Span:
        """The same share of a longer axis, or the same rank's block of it."""
        s, (n, wide), (small, large) = x.source[axis], sizes, shapes
        if s == Span(0, n):
            return Span(0, wide)
        if s.start * wide % n == 0 and s.count * wide % n == 0 and abs(s.step) == 1:
            return Span(s.start * wide // n, s.count * wide // n, s.step)
        if axis in x.axes:
            k = x.axes.index(axis)
            if s.start == self._rank * small[k] and s.count == min(small[k], n - s.start):
                start = self._rank * large[k]
                return Span(start, min(large[k], wide - start))
        raise ScaleError(f"{x.tensor}: places {s} of {n} have no like among {wide}")

    def _padding(self, gap: Gap, landings: list[Landing], info: ParameterInfo) -> Gap:
        """A constant rest behind everything that was filled."""
        end = max((x.target[0].start + x.target[0].count for x in landings if x.target), default=0)
        rest = (Span(end, info.shape[0] - end), *(Span(0, n) for n in info.shape[1:]))
        return msgspec.structs.replace(gap, parameter=info.name, rank=self._rank, target=rest)

    def _check(self, landings: list[Landing], gaps: list[Gap], model: ParameterInfo, info: ParameterInfo) -> None:
        inside = all(
            s.low >= 0 and max(s.start, s.last) < n for x in landings for s, n in zip(x.target, info.shape, strict=True)
        )
        filled, wanted = sum(size(x.target) for x in landings), size(_whole(info.shape))
        if not inside or (filled != wanted if not gaps else filled > wanted):
            raise ScaleError(f"{info.name} {list(info.shape)} is not filled as its like {list(model.shape)} is")


def _adjacent(landings: list[Landing], like: list[Landing], info: ParameterInfo) -> list[Landing]:
    """The landings with their places along each running axis closed up, in the sibling's order."""
    for axis in range(len(info.shape)):
        starts = sorted({x.target[axis].low for x in like if x.target[axis].count > 1 or x.axes[axis] >= 0})
        if len(starts) < 2:
            continue
        widths = {x.target[axis].low: abs(y.target[axis].count) for x, y in zip(like, landings, strict=True)}
        moved, at = {}, 0
        for start in starts:
            moved[start] = at
            at += widths[start]
        landings = [
            msgspec.structs.replace(y, target=_with(y.target, axis, moved.get(x.target[axis].low)))
            for x, y in zip(like, landings, strict=True)
        ]
    return landings


def _with(spans: Spans, axis: int, start: int | None) -> Spans:
    old = spans[axis]
    if start is None or abs(old.step) > 1:
        return spans
    return (*spans[:axis], Span(start, old.count, old.step), *spans[axis + 1 :])


def _renumbered(name: str, leading: list[int]) -> str:
    """``name`` with its first numbers replaced."""
    parts = pattern(name).split("*")
    found = [*leading, *numbers(name)[len(leading) :]]
    return "".join(p + (str(found[i]) if i < len(parts) - 1 else "") for i, p in enumerate(parts))


def _whole(shape: tuple[int, ...]) -> Spans:
    return tuple(Span(0, n) for n in shape)
