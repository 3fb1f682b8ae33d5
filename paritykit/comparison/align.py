"""Bringing two captures together: rows by (case, position), columns by rule, nothing copied needlessly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from paritykit.captures.manifest import Point
from paritykit.captures.reader import Capture, Span
from paritykit.comparison.judge import ranges
from paritykit.errors import CaptureFormatError
from paritykit.mapping.rules import Rule
from paritykit.mapping.transform import ReadRank, apply_rule, flat

Pair = tuple[int, torch.Tensor, torch.Tensor]
"""First position, reference rows and candidate rows, both ``[tokens, features]``."""
Stretch = tuple[int, int]
"""Consecutive positions: the first, and one past the last."""
TOGETHER = 1 << 16
"""Numbers up to which stretches that follow on each other are put together: a decoded row alone costs as much to
measure as a hundred of them."""


def pairs(
    rule: Rule, reference: Capture, candidate: Capture, case: str, *, only: Iterable[int] | None = None
) -> Iterator[Pair]:
    """Aligned rows of one point and case, in order of position. Positions that one side lacks are left out.

    ``only`` these positions, ascending, if given. What was computed in small steps is put together.
    """
    point = reference.point(rule.reference)
    wanted = stretches(candidate.spans(candidate.point(rule.candidate), case))
    if only is not None:
        wanted = list(overlaps(wanted, [(first, last + 1) for first, last in ranges(only)]))
    shared = overlaps(stretches(reference.spans(point, case)), wanted)
    for start, end in joined(shared, length=TOGETHER // max(math.prod(point.row), 1)):
        left = own_rows(reference, rule.reference, case, start, end - start)
        assert left is not None
        yield start, left, rule_rows(rule, candidate, case, start, end - start)


def shared_places(rule: Rule, reference: Capture, candidate: Capture, case: str) -> list[int]:
    """The positions that ``pairs`` gives."""
    sides = (reference, rule.reference), (candidate, rule.candidate)
    ours, theirs = (stretches(side.spans(side.point(key), case)) for side, key in sides)
    return [p for start, end in overlaps(ours, theirs) for p in range(start, end)]


def stretches(spans: Iterable[Span]) -> list[Stretch]:
    """The positions of each span."""
    return [(s.position, s.position + s.length) for s in spans]


def overlaps(left: list[Stretch], right: list[Stretch]) -> Iterator[Stretch]:
    """What two ascending lists of stretches have in common.

    >>> list(overlaps([(0, 5), (5, 9)], [(3, 7)]))
    [(3, 5), (5, 7)]
    """
    for a, b in left:
        for c, d in right:
            if max(a, c) < min(b, d):
                yield max(a, c), min(b, d)


def joined(found: Iterable[Stretch], *, length: int) -> Iterator[Stretch]:
    """Stretches that follow on each other as one, where that is no longer than ``length``.

    >>> list(joined([(0, 5), (5, 6), (6, 7), (8, 9)], length=3))
    [(0, 5), (5, 7), (8, 9)]
    """
    held: Stretch | None = None
    for start, end in found:
        if held is not None and held[1] == start and end - held[0] <= length:
            held = held[0], end
            continue
        if held is not None:
            yield held
        held = start, end
    if held is not None:
        yield held


def rule_rows(rule: Rule, capture: Capture, case: str, start: int, length: int) -> torch.Tensor:
    """What a rule takes from a capture, at these positions of a case, ``[tokens, features]``."""
    return apply_rule(rule, _reader(capture, case, start, length))


def own_rows(capture: Capture, key: str, case: str, start: int, length: int) -> torch.Tensor | None:
    """These positions of a capture's point under its own name, ``[tokens, features]``; None where it lacks some."""
    if key not in capture.points:
        return None
    parts = []
    for span in capture.spans(capture.point(key), case):
        low, high = max(start, span.position), min(start + length, span.position + span.length)
        if high > low:
            parts.append(flat(rows_of(capture, span, low, high - low)))
    if sum(map(len, parts)) != length:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def positions(capture: Capture, point: Point, case: str) -> int:
    """How many positions of ``case`` the capture holds for ``point``."""
    return sum(s.length for s in capture.spans(point, case))


def rows_of(capture: Capture, span: Span, start: int, length: int) -> torch.Tensor:
    """Rows of positions ``start`` to ``start + length`` inside one span, ``[tokens, ...]``, as a view."""
    first = span.row + start - span.position
    return capture.read(span.piece)[first : first + length]


def _reader(capture: Capture, case: str, start: int, length: int) -> ReadRank:
    """Reads these positions of a candidate point on any rank, whatever steps that rank computed them in."""

    def read(key: str, rank: int | None) -> torch.Tensor:
        point, parts = capture.point(key, rank=rank), []
        for span in capture.spans(point, case):
            low = max(start, span.position)
            high = min(start + length, span.position + span.length)
            if high > low:
                parts.append(rows_of(capture, span, low, high - low))
        if sum(map(len, parts)) != length:
            raise CaptureFormatError(
                f"{capture.path}: {key} on rank {point.rank} lacks some of the positions {start} to "
                f"{start + length - 1} of case {case!r}, which another point of the same rule has"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return read
