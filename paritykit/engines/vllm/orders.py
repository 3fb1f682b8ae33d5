"""What the engine and its workers say to each other. Imports nothing of vLLM."""

from __future__ import annotations

import msgspec

from paritykit.captures.feed import Feed
from paritykit.captures.manifest import Part
from paritykit.engines.strays import Watched

CASE_KEY = "parity_case"


class CaseOrder(msgspec.Struct, frozen=True, array_like=True):
    """What the worker must know of a case: prompt length, ids to force, how many positions it will compute, its id."""

    prompt: int
    forced: list[int]
    positions: int
    id: str


class Orders(msgspec.Struct, kw_only=True):
    """One run: where to write, what to record, the cases by index, what to feed."""

    folder: str
    points: list[str] | None
    cases: list[CaseOrder]
    feed: Feed | None = None


class Outcome(msgspec.Struct, kw_only=True):
    """What a worker did: its part, the tokens it would have chosen, and the error that ended the recording.

    ``watched`` is what it saw of its cache, if that was filled before the run.
    """

    part: Part
    chosen: list[list[int]]
    watched: Watched | None = None
    error: str = ""
