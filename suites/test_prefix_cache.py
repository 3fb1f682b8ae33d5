"""Check ``prefix_cache`` on every model: drawn prompts cold, and after others that begin alike."""

from __future__ import annotations

import paritykit as pk


def test_prefix_cache(parity: pk.Parity) -> None:
    parity.explore("prefix_cache")
