"""The paged KV cache: a request's positions lie in blocks anywhere, found by its block table."""

from __future__ import annotations

from functools import lru_cache

import torch

from paritykit.engines.nano.kv import Slots, copy_block
from paritykit.engines.nano.step import Step


class PagedCache:
    """Blocks of ``block_size`` slots; slot ``block * block_size + offset`` (vLLM's slot mapping)."""

    def __init__(self, keys: Slots, values: Slots, block_size: int) -> None:
        self.keys, self.values, self.block_size = keys, values, block_size

    def write(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """See ``LayerCache.write``: scattered by the step's slot mapping."""
        if step.written is None:
            self.keys.put(step.slots, key)
            self.values.put(step.slots, value)
        else:
            self.keys.put(step.slots[step.written], key[step.written])
            self.values.put(step.slots[step.written], value[step.written])

    def read(self, table: list[int], length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``LayerCache.read``: gathered by the block table into the shape that a contiguous cache has."""
        slots = gather_slots(tuple(table), length, self.block_size, self.keys.data.device)
        return self.keys.get(slots, dtype), self.values.get(slots, dtype)

    def copy(self, source: int, target: int) -> None:
        """See ``LayerCache.copy``."""
        copy_block(self.keys, self.values, source, target, self.block_size)


@lru_cache(maxsize=64)  # all layers ask for the same in a step
def gather_slots(table: tuple[int, ...], length: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Where positions 0 to ``length`` of a request lie, ``[length]``: the same as ``slot_mapping``, for long texts.

    Not to be written to: whoever asks next gets the same tensor.

    >>> gather_slots((7, 2), 3, block_size=2, device=torch.device("cpu")).tolist()
    [14, 15, 4]
    """
    first = torch.tensor(table, dtype=torch.int64, device=device)[:, None] * block_size
    return (first + torch.arange(block_size, device=device)).flatten()[:length]
