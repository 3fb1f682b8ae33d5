"""Loading under watch: trace the loader, load the real weights, compare them with the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from torch import nn

from paritykit.provenance.trace import Load, Weights, named_tensors, trace
from paritykit.provenance.values import compare_values
from paritykit.provenance.weightmap import RankLedger, WeightMap

TRACE_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, AssertionError, AttributeError, IndexError)


def watch_load(
    model: nn.Module,
    *,
    weights: Weights,
    load: Load,
    load_real: Callable[[], object] | None = None,
    rank: int = 0,
    padding: dict[str, tuple[int, str]] | None = None,
    known: WeightMap | None = None,
) -> RankLedger:
    """Load ``model`` and say where its weights went.

    ``load`` takes an iterator of (name, tensor); ``load_real`` loads the real weights where the engine does more for
    them. ``known`` is a map made elsewhere, in place of tracing. What goes wrong while tracing is told in the ledger
    and stops nothing; errors of loading the real weights go through.
    """
    started = time.monotonic()
    found, error = (known, "") if known is not None else _try_trace(model, weights, load, rank)
    traced = time.monotonic()
    if load_real is None:
        load(iter(weights()))
    else:
        load_real()
    loaded = time.monotonic()
    arrived = [] if error else list(compare_values(found, named_tensors(model), weights()))
    return RankLedger(
        rank=rank,
        found=found,
        arrived=arrived,
        padding=padding or {},
        error=error,
        seconds=traced - started + time.monotonic() - loaded,
    )


def _try_trace(model: nn.Module, weights: Weights, load: Load, rank: int) -> tuple[WeightMap, str]:
    try:
        return trace(partial(named_tensors, model), weights=weights, load=load, rank=rank), ""
    except TRACE_ERRORS as error:
        return WeightMap(), f"{type(error).__name__}: {error}"
