"""Check ``checkpoint`` on every model: its files and its config, before anything runs."""

from __future__ import annotations

import paritykit as pk


def test_checkpoint(parity: pk.Parity) -> None:
    parity.check("checkpoint")
