"""Check ``decode_prefill`` on every model: drawn texts in one prefill, and decoded token by token."""

from __future__ import annotations

import paritykit as pk


def test_decode_prefill(parity: pk.Parity) -> None:
    parity.explore("decode_prefill")
