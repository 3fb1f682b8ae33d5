"""Check ``kv_cache`` on every model: drawn workloads with the KV cache laid out in other ways, and full of rubbish."""

from __future__ import annotations

import paritykit as pk


def test_kv_cache(parity: pk.Parity) -> None:
    parity.explore("kv_cache")
