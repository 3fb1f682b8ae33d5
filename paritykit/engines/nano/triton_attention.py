"""Paged attention on a GPU by Triton: keys and values are read where they lie, through the block tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paritykit.engines.nano.kv import LayerCache
from paritykit.engines.nano.step import Step

if TYPE_CHECKING:
    from paritykit.engines.nano.attention import Scores

DTYPES = ("float32", "bfloat16", "float16")
SMALLEST = 16
"""Rows and columns that a matrix product of Triton has at least."""
WIDE_ROWS, HALF_ROWS = 32, 64
"""Rows of a prefill tile, in float32 and below: more do not fit a GPU's registers (as ptxas reports for sm_90)."""
WIDE_KEYS, HALF_KEYS = 16, 32
"""Keys of a block, for the same reason and to fit the 99 KiB of shared memory of small GPUs up to head_dim 256."""


def why_no_triton(device: str, dtype: str) -> str:
    """Why a model of this dtype on this device cannot use Triton, and what to do; empty if it can."""
    if dtype not in DTYPES:
        return f"computes in {', '.join(DTYPES)}, not in {dtype}: use attention_backend='torch'"
    try:
        from paritykit.engines.nano.triton_kernel import INTERPRETED
    except ImportError as error:
        return f"needs the package triton, which does not import here ({error}): pip install 'paritykit[triton]'"
    if device.startswith("cuda"):
        if INTERPRETED:
            return "runs on the CPU while TRITON_INTERPRET is set: unset it, or give device='cpu'"
        return "" if torch.cuda.is_available() else "needs a CUDA device, and torch sees none here"
    if device == "cpu" and INTERPRETED:
        return ""
    return f"needs device='cuda', not {device!r}; on a CPU it runs only, slowly, with TRITON_INTERPRET=1 set"


@dataclass(frozen=True, eq=False)
class Tiles:
    """A step cut into tiles of at most ``tokens`` tokens, as the kernel takes it.

    ``places`` are int32 ``[tiles, 4]``: first row in the batch, tokens, first position, start of the block table in
    ``tables``, which are int32 ``[blocks]`` of all chunks.
    """

    tokens: int
    places: torch.Tensor
    tables: torch.Tensor

    @classmethod
    def make(cls, step: Step, *, rows: int, tile_heads: int) -> Tiles:
        """Tiles of ``rows`` with ``tile_heads`` rows a token; of the smallest where every request has one token."""
        rows = SMALLEST if all(len(c.tokens) == 1 for c in step.chunks) else rows
        size = max(rows // tile_heads, 1)
        places: list[tuple[int, int, int, int]] = []
        blocks: list[int] = []
        for chunk, where in zip(step.chunks, step.rows, strict=True):
            count = len(chunk.tokens)
            places += [
                (where.start + n, min(size, count - n), chunk.start + n, len(blocks)) for n in range(0, count, size)
            ]
            blocks += chunk.table
        tensors = (torch.tensor(v, dtype=torch.int32, device=step.ids.device) for v in (places, blocks))
        return cls(size, *tensors)


def paged_attention(query: torch.Tensor, cache: LayerCache, step: Step, scores: Scores) -> torch.Tensor:
    """See ``attention.Backend``. Scores and sums are float32, whatever the query's dtype."""
    from paritykit.engines.nano.triton_kernel import INTERPRETED, attend_tile

    tile_heads = power_of_two(query.shape[1] // cache.keys.data.shape[1])
    rows = WIDE_ROWS if query.dtype == torch.float32 else HALF_ROWS
    tiles = step.once(paged_attention, lambda: Tiles.make(step, rows=rows, tile_heads=tile_heads))
    query = query.contiguous()
    output = torch.empty_like(query)
    constants = kernel_constants(query, cache, scores, tile_heads=tile_heads, tile_tokens=tiles.tokens)
    grid = (len(tiles.places), constants["kv_heads"])
    with torch.cuda.device(query.get_device()):
        attend_tile[grid](
            output,
            query,
            *cache_arguments(cache),
            tiles.tables,
            tiles.places,
            scores.scale,
            wide=INTERPRETED,
            **constants,
        )
    return output


def cache_arguments(cache: LayerCache) -> tuple[torch.Tensor, ...]:
    """Keys, values, and the scales of both; where there are none the data again, unread."""
    data = [s.data if s.scales is None else s.data.view(torch.uint8) for s in (cache.keys, cache.values)]
    scales = [d if s.scales is None else s.scales for s, d in zip((cache.keys, cache.values), data, strict=True)]
    return (*data, *scales)


def kernel_constants(
    query: torch.Tensor, cache: LayerCache, scores: Scores, *, tile_heads: int, tile_tokens: int
) -> dict[str, Any]:
    """What the kernel is compiled for, ``wide`` aside, and how."""
    _, heads, head_dim = query.shape
    tile_dim = max(power_of_two(head_dim), SMALLEST)
    return {
        "cap": scores.cap,
        "window": scores.window,
        "heads": heads,
        "kv_heads": cache.keys.data.shape[1],
        "head_dim": head_dim,
        "block_size": cache.block_size,
        "tile_tokens": tile_tokens,
        "tile_heads": tile_heads,
        "tile_keys": WIDE_KEYS if query.dtype == torch.float32 else HALF_KEYS,
        "tile_dim": tile_dim,
        "fp8": cache.keys.scales is not None,
        "num_warps": 4 if tile_dim <= 128 else 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count``.

    >>> [power_of_two(n) for n in (1, 3, 64, 96)]
    [1, 4, 64, 128]
    """
    return 1 << (count - 1).bit_length()
