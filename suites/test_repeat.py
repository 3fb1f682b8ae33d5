"""Check ``repeat`` on every model: drawn requests again and again."""

from __future__ import annotations

import paritykit as pk


def test_repeat(parity: pk.Parity) -> None:
    parity.explore("repeat")
