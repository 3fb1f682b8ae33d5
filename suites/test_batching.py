"""Check ``batching`` on every model: drawn requests alone, together, in another order, and twice."""

from __future__ import annotations

import paritykit as pk


def test_batching(parity: pk.Parity) -> None:
    parity.explore("batching")
