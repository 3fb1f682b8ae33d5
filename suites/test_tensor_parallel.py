"""Check ``tensor_parallel`` on every model: drawn workloads on one rank and on several."""

from __future__ import annotations

import paritykit as pk


def test_tensor_parallel(parity: pk.Parity) -> None:
    parity.explore("tensor_parallel")
