"""The Triton kernel of paged attention. Importing this needs triton; nano does so where the backend is asked for.

One program computes one tile: some tokens of one request, with all query heads of one kv head. It walks over the keys
that the tile may see, block by block, and keeps a running softmax (arXiv 1805.02867, 2205.14135) in float32. Where a
key lies is asked of the block table (arXiv 2309.06180) for each position, so any block size will do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_tile(  # noqa: PLR0917  (how kernels are called)
    output: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    tables: tl.tensor,
    tiles: tl.tensor,
    scale: tl.tensor,
    cap: tl.constexpr,
    window: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_heads: tl.constexpr,
    tile_keys: tl.constexpr,
    tile_dim: tl.constexpr,
    fp8: tl.constexpr,
    wide: tl.constexpr,
) -> None:
    """Attention of tile ``program_id(0)`` over kv head ``program_id(1)``.

    ``query`` and ``output`` are ``[tokens, heads, head_dim]``, ``keys`` and ``values`` ``[slots, kv_heads, head_dim]``,
    with ``fp8`` bytes, to be scaled by ``[slots, kv_heads]``. ``tables`` are all block tables one after another,
    ``tiles`` rows of (first row in the batch, tokens, first position, start of the table). A tile has ``tile_tokens``
    times ``tile_heads`` rows of ``tile_dim``: powers of two, and so at times more than there are.
    """
    tile = tiles + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row, tokens, start = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    table = tables + tl.load(tile + 3)

    row, dim = tl.arange(0, tile_tokens * tile_heads), tl.arange(0, tile_dim)
    token, member = row // tile_heads, row % tile_heads
    group: tl.constexpr = heads // kv_heads
    real = (token < tokens) & (member < group)
    place = ((first_row + token) * heads + kv_head * group + member)[:, None] * head_dim + dim[None]
    inside = real[:, None] & (dim < head_dim)[None]
    queries = tl.load(query + place, mask=inside, other=0.0)

    position, end = start + token, start + tokens
    highest = tl.full([tile_tokens * tile_heads], float("-inf"), tl.float32)
    total = tl.zeros([tile_tokens * tile_heads], tl.float32)
    weighted = tl.zeros([tile_tokens * tile_heads, tile_dim], tl.float32)
    begin = 0 if window is None else tl.maximum(start - window + 1, 0)
    for first in range(begin, end, tile_keys):
        key = first + tl.arange(0, tile_keys)
        held = key < end
        block = tl.load(table + key // block_size, mask=held, other=0).to(tl.int64)
        slot = (block * block_size + key % block_size) * kv_heads + kv_head

        found = read(keys, key_scales, slot, held, dim, head_dim, queries.dtype, fp8)
        scores = dot(queries, tl.trans(found), wide) * scale
        if cap is not None:
            scores = cap * tanh(scores / cap)
        scores = tl.where(seen(position[:, None], key[None], window) & held[None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        shrink = tl.exp(highest - anchor)
        weights = tl.exp(scores - anchor[:, None]).to(queries.dtype)

        found = read(values, value_scales, slot, held, dim, head_dim, queries.dtype, fp8)
        weighted = weighted * shrink[:, None] + dot(weights, found, wide)
        total = total * shrink + tl.sum(weights.to(tl.float32), 1)
        highest = higher

    result = weighted / tl.where(real, total, 1.0)[:, None]
    tl.store(output + place, result.to(queries.dtype), mask=inside)


@triton.jit
def seen(position: tl.tensor, key: tl.tensor, window: tl.constexpr) -> tl.tensor:
    """Whether the token at ``position`` sees the one at ``key``: neither the future nor beyond the window."""
    past = key <= position
    return past if window is None else past & (key > position - window)


@triton.jit
def read(  # noqa: PLR0917
    data: tl.tensor,
    scales: tl.tensor,
    slot: tl.tensor,
    held: tl.tensor,
    dim: tl.tensor,
    head_dim: tl.constexpr,
    dtype: tl.constexpr,
    fp8: tl.constexpr,
) -> tl.tensor:
    """Rows ``[slots, dim]`` of the cache in ``dtype``; zero where they are not ``held``.

    Zero and not whatever lies there: a weight of 0 times NaN is NaN.
    """
    inside = held[:, None] & (dim < head_dim)[None]
    rows = tl.load(data + slot[:, None] * head_dim + dim[None], mask=inside, other=0)
    if fp8:
        rows = fp8_value(rows) * tl.load(scales + slot, mask=held, other=0.0)[:, None]
    return rows.to(dtype)


@triton.jit
def fp8_value(byte: tl.tensor) -> tl.tensor:
    """The float32 that a float8_e4m3fn's byte means: as a half's upper bits it is 2**8 too small, NaN aside.

    By hand, since Triton converts this format only on devices of capability 8.9 and up.
    """
    bits = byte.to(tl.uint16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def dot(left: tl.tensor, right: tl.tensor, wide: tl.constexpr) -> tl.tensor:
    """Their product in float32; no TF32. ``wide`` is for Triton's interpreter, which multiplies bfloat16's bits."""
    if wide:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Near 0, where ``1 - exp(-2 |x|)`` has few correct digits, by Lambert's continued fraction, to 5 terms."""
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(square < 0.25, near, tl.where(x < 0, -far, far))


INTERPRETED = not isinstance(attend_tile, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this was imported: kernels then run on the CPU, slowly, for tests."""
