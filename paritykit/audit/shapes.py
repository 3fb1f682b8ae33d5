"""Shapes as they are stored and as a model expects them."""

from __future__ import annotations

import msgspec

Shape = tuple[int, ...]


class Mismatch(msgspec.Struct, frozen=True):
    """A tensor whose stored shape is not the one the config asks for."""

    name: str
    stored: Shape
    expected: Shape
