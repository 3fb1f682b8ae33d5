"""The KV cache: slots of keys and values in any dtype, and the contiguous layout, one stretch for each request."""

from __future__ import annotations

from typing import Protocol

import torch

from paritykit.engines.nano.step import Step

FP8_LIMIT = 448.0
"""The largest number of float8_e4m3fn."""
NAN_BYTE = 0x7F
"""Its NaN."""


class LayerCache(Protocol):
    """Keys and values of one layer, for all requests.

    Position ``p`` of a request is in slot ``table[p // block_size] * block_size + p % block_size``.
    """

    keys: Slots
    values: Slots
    block_size: int

    def write(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Keep a step's keys and values, ``[tokens, kv_heads, head_dim]`` each."""
        ...

    def read(self, table: list[int], length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions 0 to ``length`` of the request with this table, in ``dtype``."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy a block."""
        ...


class Slots:
    """Rows of ``[kv_heads, head_dim]``; in fp8 with a scale for every row and head, which moves with it.

    They start as NaN: what was never written shows when it is read.
    """

    def __init__(self, count: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.full((count, kv_heads, head_dim), float("nan"), device=device).to(dtype)
        self.scales: torch.Tensor | None = None
        if dtype.itemsize == 1:
            self.scales = torch.full((count, kv_heads, 1), float("nan"), device=device)

    def put(self, index: torch.Tensor | slice, rows: torch.Tensor) -> None:
        """Write ``rows``, ``[n, kv_heads, head_dim]``, rounded to the cache's dtype."""
        if self.scales is None:
            self.data[index] = rows.to(self.data.dtype)
            return
        scales = self.scale_of(rows)
        self.scales[index] = scales
        self._bytes[index] = (rows.float() / scales).to(self.data.dtype).view(torch.uint8)

    def get(self, index: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``[n, kv_heads, head_dim]`` in ``dtype``."""
        if self.scales is None:
            return _take(self.data, index).to(dtype)
        rows = _take(self._bytes, index).view(self.data.dtype)
        return (rows.float() * _take(self.scales, index)).to(dtype)

    def scale_of(self, rows: torch.Tensor) -> torch.Tensor:
        """What brings the largest element of every row and head to fp8's largest number, ``[n, kv_heads, 1]``."""
        return rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_LIMIT

    def move(self, source: slice, target: slice) -> None:
        """Copy rows as they are, with their scales."""
        for tensor in (self._bytes, self.scales):
            if tensor is not None:
                tensor[target] = tensor[source].clone()

    def fill(self, value: float) -> None:
        """Make every element ``value``, as it would be written."""
        self.put(slice(None), torch.full(self.data.shape, value, device=self.data.device))

    def poison(self, index: slice) -> None:
        """Make rows NaN."""
        self._bytes[index] = NAN_BYTE if self.scales is not None else float("nan")

    @property
    def _bytes(self) -> torch.Tensor:
        """The data in a dtype that can be indexed: torch has no indexed copy for fp8."""
        return self.data.view(torch.uint8) if self.scales is not None else self.data


def _take(tensor: torch.Tensor, index: torch.Tensor | slice) -> torch.Tensor:
    """``tensor[index]``, by the quickest way."""
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


class ContiguousCache:
    """Each request has one block as long as the longest possible request: its table is that one number."""

    def __init__(self, keys: Slots, values: Slots, block_size: int) -> None:
        self.keys, self.values, self.block_size = keys, values, block_size

    def write(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """See ``LayerCache.write``: each chunk is one slice."""
        for chunk, rows in zip(step.chunks, step.rows, strict=True):
            first = chunk.table[0] * self.block_size
            stretch = slice(first + chunk.start, first + chunk.end)
            self.keys.put(stretch, key[rows])
            self.values.put(stretch, value[rows])

    def read(self, table: list[int], length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``LayerCache.read``: one slice."""
        first = table[0] * self.block_size
        stretch = slice(first, first + length)
        return self.keys.get(stretch, dtype), self.values.get(stretch, dtype)

    def copy(self, source: int, target: int) -> None:
        """See ``LayerCache.copy``."""
        copy_block(self.keys, self.values, source, target, self.block_size)


def copy_block(keys: Slots, values: Slots, source: int, target: int, block_size: int) -> None:
    """Copy one block of keys and values."""
    from_, to = (slice(n * block_size, (n + 1) * block_size) for n in (source, target))
    keys.move(from_, to)
    values.move(from_, to)
