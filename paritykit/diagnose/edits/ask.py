"""What is asked of the reference's process: which edit of its code gives the candidate's numbers. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from paritykit.comparison.tolerance import Tolerance
from paritykit.mapping.rules import Rule

SEARCH = "paritykit.engines.editing:search_edits"
BUDGET = 30.0
"""Seconds of a search: some 300 edits of one attention of SmolLM2, or thousands of a tiny model's."""


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """A point to be explained, the output of the module that is edited: what two correct engines may differ by there,
    of all rows and of one, and the noise there is.
    """

    point: str
    allowed: Tolerance
    floor: float = 0.0


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Two captures by their folders, the rules between them, and ``looks``: the module to blame, then those around."""

    reference: str
    candidate: str
    rules: list[Rule]
    looks: list[Looked]
    cases: list[str]
    budget: float = BUDGET


class EditFound(msgspec.Struct, frozen=True, kw_only=True):
    """An edit and what it leaves of the difference, on positions that it was not chosen by.

    ``fits``: no more than two correct engines may differ by. ``confidence`` says how much better it explains than any
    that gives other numbers; ``rival`` is what the next of those leaves.
    """

    module: str
    label: str
    where: str
    code: str
    left: float
    fits: bool
    confidence: float
    rival: float
    tried: int


Ask = Callable[[Question], list[EditFound]]
