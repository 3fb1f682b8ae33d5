"""Feeding a run: what a module took or gave is replaced by another capture's rows of the same case and position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from paritykit.captures.feed import Feed, Fill
from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.errors import UsageError

Rows = Callable[[torch.Tensor, str], torch.Tensor | None]
"""Brings a module's tensor to rows of tokens, ``[tokens, ...]``; None where it has no token axis. Second: its key."""


def check_feed(feed: Feed, cases: Sequence[Case]) -> None:
    """See that a feed can be carried out for ``cases``, before an engine's worker is touched.

    Raises CaptureFormatError for a capture that does not open, UnknownNameError for a point it has not, UsageError for
    columns it has not or other cases.
    """
    capture = Capture.open(feed.capture, verify=False)
    for case in cases:
        known = capture.cases.get(case.id)
        if known is None or known.tokens != case.tokens:
            raise UsageError(f"{feed.capture} cannot feed case {case.id!r}: it has no such case with these tokens")
    for fed in feed.points:
        for fill in fed.fills:
            width = math.prod(capture.point(fill.source).row)
            if min(fill.first, fill.start, fill.length - 1) < 0 or fill.first + fill.length > width:
                columns = f"{fill.first}:{fill.first + fill.length}"
                raise UsageError(f"{fed.point} cannot be fed columns {columns} of {fill.source}, which has {width}")


def make_feeder(feed: Feed | None, cases: Sequence[Case]) -> Feeder | None:
    """What the only rank of an engine is fed, once ``check_feed`` has seen it; None where nothing is."""
    if feed is None:
        return None
    check_feed(feed, cases)
    return Feeder(feed, rank=0, cases=[c.id for c in cases])


class Feeder:
    """What one rank is fed. ``cases`` are the ids of the run's cases, by their number in its segments."""

    def __init__(self, feed: Feed, *, rank: int, cases: Sequence[str]) -> None:
        self._capture = Capture.open(feed.capture, verify=False)
        self._fills = {p.point: p.fills for p in feed.points if p.rank == rank}
        self._cases = cases
        self._segments: list[Segment] = []
        self._seen: set[str] = set()
        self._short: set[str] = set()

    @property
    def fed(self) -> list[str]:
        """The points of which every row that was seen was fed."""
        return [k for k in self._fills if k in self._seen - self._short]

    def begin(self, segments: list[Segment]) -> None:
        """A forward pass starts, its rows labelled by ``segments``."""
        self._segments = segments

    def value(self, key: str, tensor: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        """A new tensor to go on with in the place of ``tensor``, which is left as it is; None where nothing is fed.

        So it is with rows that lie scattered in it, which cannot be put back. Raises ValueError where it has not the
        columns or rows that are to be filled.
        """
        fills = self._fills.get(key)
        if fills is None:
            return None
        with _disable_current_modes():  # what is fed is no part of what a mode watches
            new = tensor.detach().clone()
            shown = rows(new, key)
            if shown is None or shown.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                self._short.add(key)
                return None
            self._fill(key, fills, shown)
        self._seen.add(key)
        return new

    def refuse(self, key: str) -> None:
        """Note that what ``value`` gave for a point could not be put in its place."""
        self._short.add(key)

    def _fill(self, key: str, fills: tuple[Fill, ...], shown: torch.Tensor) -> None:
        """Write into ``shown``, ``[tokens, ...]``, which is a view of ``new``."""
        flat = shown.reshape(len(shown), -1)
        if len(flat) != sum(s.length for s in self._segments) or flat.shape[1] < max(f.start + f.length for f in fills):
            raise ValueError(f"{key}: rows of {list(shown.shape)} are not those it is to be fed")
        row, known = 0, dict[tuple[str, int, int, int], tuple[list[int], torch.Tensor | None]]()
        for segment in self._segments:
            rows = flat[row : row + segment.length]
            for fill in fills:
                which = fill.source, segment.case, segment.start, segment.length
                if which not in known:  # draws hold one case many times
                    known[which] = self._source(fill.source, segment)
                places, source = known[which]
                if source is not None:
                    columns = source[:, fill.first : fill.first + fill.length].to(rows.device, rows.dtype)
                    rows[places, fill.start : fill.start + fill.length] = columns
                if len(places) != segment.length:
                    self._short.add(key)
            row += segment.length
        if flat.data_ptr() != shown.data_ptr():
            shown.copy_(flat.view(shown.shape))

    def _source(self, source: str, segment: Segment) -> tuple[list[int], torch.Tensor | None]:
        """The rows of a segment that the other capture's point has, ``[count, columns]``, and which they are."""
        places: list[int] = []
        parts = []
        for span in self._capture.spans(self._capture.point(source), self._cases[segment.case]):
            low = max(span.position, segment.start)
            count = min(span.position + span.length, segment.start + segment.length) - low
            if count > 0:
                part = self._capture.part(span.piece, span.row + low - span.position, count)
                parts.append(part.reshape(count, -1))
                places += range(low - segment.start, low - segment.start + count)
        return places, torch.cat(parts) if parts else None
