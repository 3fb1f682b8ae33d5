"""Reading vLLM's KV cache, whatever its layout.

Backends pack the inside of a block as their kernels like it, by instruction set on a CPU. Instead of knowing every
layout, numbers are written into a spare block with the engine's own cache-write operation, and looked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from paritykit.errors import EngineError

BASE = 128
"""Digits below this are exact in every dtype of two bytes that a cache is kept in, bfloat16 too."""
BASE_OF_A_BYTE = 8
"""The same for both formats of 8 bits."""
SAFE = 1 + 1 / 64
"""Digits are written a little larger: a kernel that cuts what a scale has made a little smaller then keeps them."""
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""What vLLM's names of cache dtypes mean, where the cache itself is one of bytes."""


@dataclass(frozen=True)
class BlockLayout:
    """Where a block keeps its keys and values: places in the flattened block, ``[slots, kv_heads, head_dim]``."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def slots(self) -> int:
        """Positions in a block."""
        return len(self.keys)

    @classmethod
    def find(cls, layer: Any) -> BlockLayout:
        """The layout that an attention layer of vLLM writes. Raises EngineError where it cannot be found out."""
        cache, heads, dtype = layer.kv_cache, layer.num_kv_heads, stored_dtype(layer)
        widths = layer.head_size, getattr(layer, "head_size_v", layer.head_size)
        block = torch.zeros_like(cache[:1])
        slots = block.numel() // (heads * sum(widths))
        if not slots or dtype is None:
            raise EngineError(f"a cache of {cache.dtype} {list(cache.shape)} cannot be read")
        shapes = [(slots, heads, w) for w in widths]
        found = _search(layer, block, shapes, dtype=dtype)
        places = torch.full((sum(map(math.prod, shapes)) + 1,), -1, dtype=torch.int64, device=cache.device)
        places[found] = torch.arange(len(found), device=cache.device)
        if found.max() >= len(places) or (places[1:] < 0).any():
            raise EngineError("the cache does not hold what was written to it, element by element")
        keys, values = torch.split(places[1:], [math.prod(s) for s in shapes])
        return cls(keys.view(shapes[0]), values.view(shapes[1]))

    def read(self, cache: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of ``positions`` of the request with this block table, ``[tokens, kv_heads, head_dim]``."""
        blocks = cache[table[positions // self.slots].long()].flatten(1)
        offsets = positions % self.slots
        return [blocks.gather(1, p[offsets].flatten(1)).view(-1, *p.shape[1:]) for p in (self.keys, self.values)]


def _search(layer: Any, block: torch.Tensor, shapes: list[tuple[int, int, int]], *, dtype: torch.dtype) -> torch.Tensor:
    """Which element, counted from 1 over keys and then values, each place of the flattened block holds; 0 for none."""
    total = sum(map(math.prod, shapes))
    bytewise = dtype.itemsize == 1
    base, wide = (BASE_OF_A_BYTE, torch.bfloat16) if bytewise else (BASE, dtype)
    sizes = [SAFE * scale for scale in scales_of(layer)] if bytewise else [1.0, 1.0]
    numbers = torch.arange(1, total + 1, device=block.device)
    slots = torch.arange(shapes[0][0], device=block.device)
    found = torch.zeros(block.numel(), dtype=torch.int64, device=block.device)
    scale = 1
    while scale <= total:
        digits = (numbers // scale % base).to(wide)
        parts = torch.split(digits, [math.prod(s) for s in shapes])
        keys, values = (p.view(s) * size for p, s, size in zip(parts, shapes, sizes, strict=True))
        layer.impl.do_kv_cache_update(layer, keys, values, block.zero_(), slots)
        found += block.flatten().view(dtype).to(wide).to(torch.int64) * scale
        scale *= base
    return found


class CacheReader:
    """Reads the caches of all attention layers of one worker; a layout is found once for all layers of a kind."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], BlockLayout] = {}

    def layers(self, context: Any) -> dict[str, Any]:
        """The attention layers with keys and values of their own, by name, in vLLM's forward context."""
        found = {n: m for n, m in context.no_compile_layers.items() if is_readable(m)}
        return {n: m for n, m in found.items() if n in context.attn_metadata}

    def read(self, layer: Any, table: torch.Tensor, end: int) -> tuple[int, list[torch.Tensor]]:
        """The first position that is sure to be kept, and keys and values from there to ``end``.

        Behind a sliding window, or before the chunk that is seen, blocks are given to other layers, and a block table
        does not tell.
        """
        start = first_kept(layer, end)
        positions = torch.arange(start, end, device=table.device)
        pair = self.layout(layer).read(layer.kv_cache, table, positions)
        dtype = stored_dtype(layer)
        if dtype is not None and dtype.itemsize == 1:
            pair = [p.view(dtype).float() * scale for p, scale in zip(pair, scales_of(layer), strict=True)]
        return start, pair

    def layout(self, layer: Any) -> BlockLayout:
        """How the layer's blocks are packed. Raises EngineError where it cannot be found out."""
        kind = _kind(layer)
        if kind not in self._layouts:
            self._layouts[kind] = BlockLayout.find(layer)
        return self._layouts[kind]


def _kind(layer: Any) -> tuple[Any, ...]:
    """What the layout of a layer's blocks depends on."""
    cache, heads = layer.kv_cache, (layer.num_kv_heads, layer.head_size, getattr(layer, "head_size_v", 0))
    backend = (type(layer.impl), getattr(layer.impl, "isa", None) or getattr(layer, "isa", None))
    return (*backend, cache.dtype, stored_dtype(layer), cache.shape[1:], cache.stride(), *heads)


def stored_dtype(layer: Any) -> torch.dtype | None:
    """The format of the numbers in a layer's cache; None for one that cannot be read."""
    dtype: torch.dtype = layer.kv_cache.dtype
    if dtype.itemsize > 1:
        return dtype if dtype.is_floating_point else None
    return FP8.get(getattr(layer, "kv_cache_dtype", ""))


def scales_of(layer: Any) -> tuple[float, float]:
    """What the numbers that a layer keeps in 8 bits were divided by: keys, and values."""
    return float(getattr(layer, "_k_scale_float", 1.0)), float(getattr(layer, "_v_scale_float", 1.0))


def is_readable(layer: Any) -> bool:
    """Whether ``layer`` keeps plain keys and values: no latents, no state, not another layer's."""
    impl = getattr(layer, "impl", None)
    return (
        hasattr(impl, "do_kv_cache_update")
        and hasattr(layer, "num_kv_heads")
        and not hasattr(layer, "kv_lora_rank")
        and isinstance(getattr(layer, "kv_cache", None), torch.Tensor)
        and not getattr(layer, "kv_sharing_target_layer_name", None)
    )


def first_kept(layer: Any, end: int) -> int:
    """The first position that a layer sees, and so is sure to keep, once ``end`` positions are computed."""
    chunk = chunk_of(layer)
    if chunk:
        return (end - 1) // chunk * chunk
    window = window_of(layer)
    return max(0, end - window) if window else 0


def chunk_of(layer: Any) -> int:
    """The chunk that a layer's attention is cut into; 0 where it is not."""
    return int(getattr(layer, "attention_chunk_size", None) or 0)


def window_of(layer: Any) -> int:
    """The sliding window of an attention layer; 0 where it sees all of the past."""
    return int(getattr(layer, "sliding_window", None) or 0)
