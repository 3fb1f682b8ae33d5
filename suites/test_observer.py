"""Check ``observer`` on every model: drawn requests recorded and not."""

from __future__ import annotations

import paritykit as pk


def test_observer(parity: pk.Parity) -> None:
    parity.explore("observer")
