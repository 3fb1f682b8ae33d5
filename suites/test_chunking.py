"""Check ``chunking`` on every model: drawn prompts in one prefill and in chunks."""

from __future__ import annotations

import paritykit as pk


def test_chunking(parity: pk.Parity) -> None:
    parity.explore("chunking")
