"""vLLM's KV cache under watch: where its slots are, and which of them requests own by what the scheduler told.

Ownership is taken from the block ids that the scheduler sent with each request, not from the slot mapping that is made
of them: that one may be what is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from paritykit.captures.manifest import Segment
from paritykit.engines.shelf import Shelf, row_slots
from paritykit.engines.slots import SlotWatch
from paritykit.engines.strays import Access, Watched
from paritykit.engines.vllm.kv import CacheReader, is_readable, window_of
from paritykit.errors import EngineError

STATE = "it keeps another state than keys and values, or shares memory with a layer that does"


class CacheWatch:
    """From ``CacheWatch(...)``, made when the whole cache holds one number, to ``finish()``.

    ``before_step`` and ``after_step`` are called around every pass of the model that requests take part in.
    """

    def __init__(self, runner: Any, *, rank: int, reader: CacheReader) -> None:
        self._runner = runner
        self._groups = runner.kv_cache_config.kv_cache_groups
        self._reuses = bool(runner.cache_config.enable_prefix_caching)
        self._sizes = {n: int(g.kv_cache_spec.block_size) for n, g in enumerate(self._groups)}
        layers = runner.vllm_config.compilation_config.static_forward_context
        self._windows = {n: _window(layers, g.layer_names) for n, g in enumerate(self._groups)}
        shelves, unwatched = _find_shelves(layers, self._groups, self._sizes, reader)
        self._watch = SlotWatch(shelves, rank=rank, unwatched=unwatched)
        self._live: dict[int, set[int]] = {n: set() for n in self._sizes}

    def before_step(self) -> None:
        """Blocks that were handed out since may have been cleared or copied to; those given up are filled again."""
        live = {n: {b for r in self._runner.requests.values() for b in r.block_ids[n]} for n in self._sizes}
        for group, blocks in live.items():
            self._watch.adopt(blocks - self._live[group], size=self._sizes[group], group=group)
        if not self._reuses:
            self._watch.refill(live, sizes=self._sizes)
        self._live = live

    def after_step(self, requests: Sequence[str], segments: Sequence[Segment]) -> None:
        """The pass is over; ``requests`` took part, each with its segment."""
        self._watch.after_step(
            [
                Access(
                    case=segment.case,
                    table=self._runner.requests[request].block_ids[group],
                    size=size,
                    start=segment.start,
                    end=segment.start + segment.length,
                    first=max(0, segment.start - window) if (window := self._windows[group]) else 0,
                    group=group,
                    reuses=self._reuses,
                )
                for request, segment in zip(requests, segments, strict=True)
                for group, size in self._sizes.items()
            ]
        )

    def finish(self) -> Watched:
        """What was seen."""
        return self._watch.finish()


def _window(layers: dict[str, Any], names: Sequence[str]) -> int:
    """The sliding window of a group of layers; 0 where one sees all of the past."""
    windows = [window_of(layers[n]) for n in names if n in layers]
    return max(windows) if windows and all(windows) else 0


def _find_shelves(
    layers: dict[str, Any], groups: Sequence[Any], sizes: dict[int, int], reader: CacheReader
) -> tuple[list[Shelf], dict[str, str]]:
    """One for each tensor of blocks, whichever layers share it; the layers that cannot be watched, with the reason."""
    group_of = {name: n for n, group in enumerate(groups) for name in group.layer_names}
    held = {name: layers[name].kv_cache for name in group_of if name in layers}
    if any(not isinstance(cache, torch.Tensor) for cache in held.values()):
        return [], {module_of(name): STATE for name in held}
    shared: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, cache in held.items():
        shared[cache.data_ptr(), cache.dtype, tuple(cache.shape), cache.stride()].append(name)
    return [
        _shelf(layers[names[0]], names, frozenset(group_of[n] for n in names), sizes[group_of[names[0]]], reader)
        for names in shared.values()
    ], {}


def _shelf(layer: Any, names: list[str], groups: frozenset[int], size: int, reader: CacheReader) -> Shelf:
    """The tensor of ``layer``; where nothing is known of the inside of its blocks, only those are told apart."""
    cache, modules = layer.kv_cache, tuple(map(module_of, names))
    if is_readable(layer):
        try:
            layout = reader.layout(layer)
        except EngineError:
            return Shelf(modules, (cache,), size, groups=groups)
        places = torch.full((cache[:1].numel(),), -1, dtype=torch.int64)
        for part, found in enumerate((layout.keys, layout.values)):
            of_slot = row_slots(layout.slots, found[0].numel()) + part * layout.slots
            places[found.flatten().cpu()] = of_slot
        return Shelf(modules, (cache,), layout.slots, slots=(places,), groups=groups)
    if cache.dim() == 3 and cache.shape[1] == size:
        return Shelf(modules, (cache,), size, ("latent",), (row_slots(size, cache.shape[2]),), groups)
    return Shelf(modules, (cache,), size, groups=groups)


def module_of(layer: str) -> str:
    """The attention module around vLLM's attention layer of that name."""
    return layer.rpartition(".")[0]
