"""Loading under watch: find out where the loader puts weights, load the real ones, compare them with the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from paritykit.provenance.follow import Follower
from paritykit.provenance.followed import Samples, followed_map
from paritykit.provenance.trace import Load, Weights, named_tensors, trace
from paritykit.provenance.values import compare_values
from paritykit.provenance.weightmap import RankLedger, WeightMap

LARGE = 1 << 24
"""Elements of a model from which on its loading is followed and no longer traced, which costs passes and memory."""
TRACE_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, AssertionError, AttributeError, IndexError)
Give = Callable[[str, torch.Tensor], torch.Tensor]
"""What a loader passes each tensor of the checkpoint through, with its name, before it does anything with it."""


def watch_load(
    model: nn.Module,
    *,
    weights: Weights,
    load: Load,
    load_real: Callable[[Give], object] | None = None,
    rank: int = 0,
    padding: dict[str, tuple[int, str]] | None = None,
    large: int = LARGE,
) -> RankLedger:
    """Load ``model`` and say where its weights went.

    ``load`` takes an iterator of (name, tensor); ``load_real`` loads the real weights where the engine does more for
    them. The loader is traced first, with tensors made for it; a model of ``large`` elements or more, or one whose
    loader cannot be traced, is followed while the real weights are loaded. What goes wrong in this is told in
    the ledger and stops nothing; errors of loading the real weights go through.
    """

    def loading(give: Give) -> None:
        if load_real is None:
            load((name, give(name, tensor)) for name, tensor in weights())
        else:
            load_real(give)

    started = time.monotonic()
    found: WeightMap | None = None
    if sum(t.numel() for t in named_tensors(model).values()) < large:
        found, error = _tried(partial(trace, partial(named_tensors, model), weights=weights, load=load, rank=rank))
    traced = time.monotonic()
    if found is not None:
        loading(_given)
        error = ""
    else:
        found, error = _followed(model, loading, rank)
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


def _followed(model: nn.Module, loading: Callable[[Give], None], rank: int) -> tuple[WeightMap, str]:
    """The map that following the real loading gives, or why it gives none."""
    before = Samples(named_tensors(model))
    with Follower(named_tensors(model).values()) as follower:
        loading(follower.give)
    if follower.error:
        return WeightMap(), follower.error
    found, error = _tried(lambda: followed_map(follower, named_tensors(model), rank=rank, before=before))
    return found or WeightMap(), error


def _given(name: str, tensor: torch.Tensor) -> torch.Tensor:
    del name
    return tensor


def _tried(make: Callable[[], WeightMap]) -> tuple[WeightMap | None, str]:
    """The map that ``make`` gives, or the reason why there is none."""
    try:
        return make(), ""
    except TRACE_ERRORS as error:
        return None, f"{type(error).__name__}: {error}"
