"""Check ``pipeline_parallel`` on every model: drawn workloads in one stage and in several."""

from __future__ import annotations

import paritykit as pk


def test_pipeline_parallel(parity: pk.Parity) -> None:
    parity.explore("pipeline_parallel")
