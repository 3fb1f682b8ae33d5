"""Check ``weights`` on every model: where the candidate's own loader puts each element of the checkpoint."""

from __future__ import annotations

import paritykit as pk


def test_weights(parity: pk.Parity) -> None:
    parity.check("weights")
