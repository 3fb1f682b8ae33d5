"""Whether the real weights arrived: parameters against the checkpoint, box by box, in bounded memory.

A landing says where a box of a tensor went; here its numbers are compared, after the cast to the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec
import torch

from paritykit.provenance.changes import forward
from paritykit.provenance.moves import as_source, box
from paritykit.provenance.weightmap import Arrived, Landing, Span, WeightMap

CHUNK = 1 << 22
"""Elements compared at a time."""


class _Worst(NamedTuple):
    differing: int
    largest: float
    first: tuple[tuple[int, ...], float, float] | None


def compare_values(
    found: WeightMap,
    parameters: Mapping[str, torch.Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Arrived]:
    """One record for each landing whose change is known, tensors in the order of ``weights``.

    Every tensor is looked at once, ``CHUNK`` elements at a time.
    """
    landings: dict[tuple[str, int], list[Landing]] = {}
    for landing in found.landings:
        landings.setdefault((landing.tensor, landing.copy), []).append(landing)
    copies: dict[str, int] = {}
    for name, tensor in weights:
        copy = copies.get(name, 0)
        copies[name] = copy + 1
        for landing in landings.get((name, copy), ()):
            if progress:
                progress(name)
            yield _compare(landing, tensor, parameters[landing.parameter].detach())


def _compare(landing: Landing, tensor: torch.Tensor, parameter: torch.Tensor) -> Arrived:
    differing, elements, largest = 0, 0, 0.0
    first: tuple[tuple[int, ...], float, float] | None = None
    for part in _chunks(landing):
        expected = box(tensor, part.source)
        filled = as_source(box(parameter, part.target), part).to(expected.device)
        worst = _differing(expected, filled, part)
        elements += expected.numel()
        differing += worst.differing
        largest = max(largest, worst.largest)
        first = first or worst.first
    return Arrived(
        tensor=landing.tensor,
        parameter=landing.parameter,
        rank=landing.rank,
        elements=elements,
        differing=differing,
        largest=largest,
        index=first[0] if first else (),
        expected=first[1] if first else None,
        found=first[2] if first else None,
    )


def _differing(expected: torch.Tensor, filled: torch.Tensor, part: Landing) -> _Worst:
    if part.change:
        return _changed(expected, filled, part)
    cast = expected.to(filled.dtype)
    if torch.equal(cast, filled):
        return _Worst(0, 0.0, None)
    wrong = cast != filled
    if cast.is_floating_point():
        wrong &= ~(cast.isnan() & filled.isnan())
    return _worst(wrong, cast.to(torch.float64), filled.to(torch.float64), part)


def _changed(expected: torch.Tensor, filled: torch.Tensor, part: Landing) -> _Worst:
    """With a change on the way numbers agree to within the rounding of the parameter's dtype."""
    wanted = forward(part.change)(expected.to(torch.float64)).to(filled.dtype).to(torch.float64)
    got = filled.to(torch.float64)
    eps = torch.finfo(filled.dtype).eps if filled.is_floating_point() else 0.0
    same = (wanted == got) | (wanted.isnan() & got.isnan()) | ((wanted - got).abs() <= 8 * eps * (wanted.abs() + 1))
    return _worst(~same, wanted, got, part)


def _worst(wrong: torch.Tensor, expected: torch.Tensor, found: torch.Tensor, part: Landing) -> _Worst:
    count = int(wrong.sum())
    if not count:
        return _Worst(0, 0.0, None)
    gap = (expected - found).abs()[wrong].nan_to_num(float("inf"))
    at = wrong.nonzero()[0].tolist()
    index = tuple(s.start + s.step * i for s, i in zip(part.source, at, strict=True))
    return _Worst(count, float(gap.max()), (index, float(expected[tuple(at)]), float(found[tuple(at)])))


def _chunks(landing: Landing) -> Iterator[Landing]:
    """The landing in pieces along the tensor's longest running axis."""
    running = [(s.count, axis) for axis, s in enumerate(landing.source) if axis in landing.axes]
    total = 1
    for count, _ in running:
        total *= count
    if total <= CHUNK or not running:
        yield landing
        return
    count, axis = max(running)
    rows = max(1, CHUNK * count // total)
    other = landing.axes.index(axis)
    for start in range(0, count, rows):
        many = min(rows, count - start)
        yield msgspec.structs.replace(
            landing,
            source=_cut(landing.source, axis, start, many),
            target=_cut(landing.target, other, start, many),
        )


def _cut(spans: tuple[Span, ...], axis: int, start: int, count: int) -> tuple[Span, ...]:
    old = spans[axis]
    return (*spans[:axis], Span(old.start + old.step * start, count, old.step), *spans[axis + 1 :])
