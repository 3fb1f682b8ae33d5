"""What a run is fed: rows of another capture, put in the place of its own points once these were seen. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paritykit.captures.manifest import Part


class Fill(msgspec.Struct, frozen=True, array_like=True):
    """``length`` feature columns from ``start`` become those from ``first`` of the feeding capture's ``source``."""

    source: str
    first: int
    start: int
    length: int


class FedPoint(msgspec.Struct, frozen=True, array_like=True):
    """A point of the engine on one rank, by key, and what its columns are filled with; others stay its own."""

    point: str
    rank: int
    fills: tuple[Fill, ...]


class Feed(msgspec.Struct, frozen=True):
    """The folder of the capture that feeds, and the points it feeds. Rows are found by case and position."""

    capture: str
    points: tuple[FedPoint, ...]


def fully_fed(feed: Feed, parts: Sequence[Part]) -> list[str]:
    """The points of which every row was fed on every rank that ``feed`` names; ``parts`` in order of rank.

    A capture of a run that was fed tells them in its facts, as ``fed``.
    """
    done = [set(part.fed) for part in parts]
    short = {p.point for p in feed.points if p.rank >= len(done) or p.point not in done[p.rank]}
    return list(dict.fromkeys(p.point for p in feed.points if p.point not in short))
