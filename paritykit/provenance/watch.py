"""Loading under watch: trace the loader, load the real weights, compare them with the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from torch import nn

from paritykit.provenance.scale import ScaleError, scale_map
from paritykit.provenance.sources import list_sources
from paritykit.provenance.trace import Load, Weights, describe, named_tensors, tensor_infos, trace
from paritykit.provenance.values import compare_values
from paritykit.provenance.weightmap import RankLedger, WeightMap

TRACE_ERRORS = (ScaleError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, AttributeError, IndexError)


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
    them. ``known`` is the map of a small sibling, in place of tracing. What goes wrong while tracing is told in the
    ledger and stops nothing; errors of loading the real weights go through.
    """
    started = time.monotonic()
    found, error = _tried(lambda: trace(partial(named_tensors, model), weights=weights, load=load, rank=rank), known)
    traced = time.monotonic()
    if load_real is None:
        load(iter(weights()))
    else:
        load_real()
    loaded = time.monotonic()
    if known is not None:
        found, error = _tried(lambda: _carried(known, model, weights, rank))
    arrived = [] if error else list(compare_values(found, named_tensors(model), weights()))
    return RankLedger(
        rank=rank,
        found=found,
        arrived=arrived,
        padding=padding or {},
        error=error,
        seconds=traced - started + time.monotonic() - loaded,
    )


def _tried(make: Callable[[], WeightMap], instead: WeightMap | None = None) -> tuple[WeightMap, str]:
    """The map that ``make`` gives, or ``instead`` without trying; the reason where there is none."""
    if instead is not None:
        return instead, ""
    try:
        return make(), ""
    except TRACE_ERRORS as error:
        return WeightMap(), f"{type(error).__name__}: {error}"


def _carried(known: WeightMap, model: nn.Module, weights: Weights, rank: int) -> WeightMap:
    """The sibling's map for this model; its own parameters are listed after loading, which may have made some."""
    return scale_map(known, tensor_infos(list_sources(weights())), describe(named_tensors(model), rank), rank=rank)
