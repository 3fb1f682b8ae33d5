"""Check ``modules`` on every model, for prompts of several lengths in one batch and new tokens after them."""

from __future__ import annotations

import paritykit as pk


@pk.cases("smoke")
def test_modules(parity: pk.Parity, case: str) -> None:
    parity.check("modules", case)
