"""nano's KV cache under watch: where its slots are, and which of them a plan's requests own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from paritykit.engines.nano.kv import LayerCache, Slots
from paritykit.engines.nano.step import Plan
from paritykit.engines.shelf import Shelf, row_slots
from paritykit.engines.slots import SlotWatch
from paritykit.engines.strays import Access


def watch_caches(names: Sequence[str], caches: Iterable[LayerCache], *, rank: int) -> SlotWatch:
    """A watch over the caches of these layers, in which every block holds the same."""
    return SlotWatch([_shelf(n, c) for n, c in zip(names, caches, strict=True)], rank=rank)


def plan_accesses(plan: Plan, block_size: int) -> list[Access]:
    """What the requests of a plan do, by the scheduler's tables; what was found in the cache is not written again."""
    return [Access(c.label, c.table, block_size, max(c.start, c.cached), c.end) for c in plan.chunks]


def _shelf(name: str, cache: LayerCache) -> Shelf:
    size = cache.block_size
    tensors, slots = list[torch.Tensor](), list[torch.Tensor]()
    for part, kept in enumerate((cache.keys, cache.values)):
        for tensor in _rows(kept):
            tensors.append(tensor.view(-1, size, *tensor.shape[1:]))
            slots.append(row_slots(size, tensor[0].numel()) + part * size)
    return Shelf((name,), tuple(tensors), size, slots=tuple(slots))


def _rows(kept: Slots) -> list[torch.Tensor]:
    return [kept.data] if kept.scales is None else [kept.data, kept.scales]
