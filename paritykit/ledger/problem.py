"""One thing that is wrong with weights, and how places are told. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgspec

from paritykit.ledger.subject import WeightSubject
from paritykit.provenance.weightmap import Spans, show


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: ``code`` names its kind, ``elements`` says how many weights it touches.

    ``names`` are other names it is about. ``cancels`` says why it changes nothing that is computed, where that is so.
    """

    code: str
    name: str
    message: str
    elements: int = 0
    rank: int | None = None
    names: tuple[str, ...] = ()
    cancels: str = ""


Rule: TypeAlias = Callable[[WeightSubject], Iterator[Problem]]


def on_rank(subject: WeightSubject, rank: int) -> str:
    """``" on rank 1"``, or nothing where there is one rank only."""
    return f" on rank {rank}" if subject.ranks > 1 else ""


def boxes_text(boxes: list[Spans], shape: tuple[int, ...]) -> str:
    """The first few of some boxes."""
    shown = ", ".join(show(b, shape) for b in boxes[:3])
    return shown + (f" and {len(boxes) - 3} more" if len(boxes) > 3 else "")


def size_of(shape: tuple[int, ...]) -> int:
    """Elements of a shape."""
    return math.prod(shape)
