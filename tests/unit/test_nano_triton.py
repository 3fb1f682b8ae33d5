"""The Triton kernel: as near to the truth as the torch backend, whatever the batch; never what it must not read.

Each law is tried by Triton's interpreter on the CPU and, where there is one, on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paritykit.engines.nano.attention import Backend, Scores, gather_attention
from paritykit.engines.nano.kv import Slots
from paritykit.engines.nano.paged import PagedCache
from paritykit.engines.nano.step import Chunk, Plan, Step
from paritykit.engines.nano.triton_attention import Tiles, paged_attention, power_of_two
from tests.attention import FP8, HAVE_TRITON, Batch, Cache, any_batch, error, interpreter, on_gpu, spans
from tests.nano import one_thread

UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Rounding to the dtype changes a number by this much at most."""
GPU_EXP = 2**-22
"""On a GPU Triton's exponential is ex2.approx.f32, which is CUDA's exp2f: right to two units of the last place."""
FACTOR = 3.0
"""Sums are made in another order. Of 1200 random batches in the interpreter the worst ratio of errors was 1.7 in
float32, 0.8 in float16, and 1.9 in bfloat16, which the interpreter cuts off instead of rounding. A wrong mask gives
1e4 and more in float32."""


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def triton(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if not HAVE_TRITON:
        pytest.skip("triton is not installed")
    with one_thread():
        if request.param == "interpreter":
            with interpreter() as backend:
                yield backend
        elif torch.cuda.is_available():
            yield on_gpu
        else:
            pytest.skip("no CUDA device on this machine")


def run(backend: Backend, batch: Batch, cache: Cache | None = None) -> torch.Tensor:
    output = backend(batch.query(), batch.cache() if cache is None else cache, batch.step(), batch.scores)
    assert (output.shape, output.dtype) == (batch.query().shape, batch.dtype)
    return output


def assert_near_the_truth(triton: Backend, batch: Batch, factor: float) -> None:
    truth = batch.truth(batch.cache())
    floor = max(error(run(gather_attention, batch), truth), UNIT[batch.dtype])
    assert error(run(triton, batch), truth) <= factor * floor


@given(batch=any_batch())
@example(Batch(spans=((0, 40), (7, 8)), heads=34, block_size=3))
@example(Batch(spans=((3, 40), (7, 8)), head_dim=256, kv_heads=4))
@example(Batch(spans=((0, 40), (7, 8)), scores=Scores(0.25, cap=200.0)))
@example(Batch(spans=((0, 40), (7, 8)), scores=Scores(1.0, cap=2.0)))
@settings(max_examples=30, deadline=None)
def test_any_batch_is_as_near_to_the_truth_as_by_torch(triton: Backend, batch: Batch) -> None:
    cache = batch.cache()
    truth = batch.truth(cache)
    rounded_score = UNIT[torch.float32] * batch.largest_score(cache)  # torch may be lucky with few tokens and heads
    unit = max(UNIT[batch.dtype], GPU_EXP if triton is on_gpu else 0.0)
    floor = max(error(run(gather_attention, batch, cache), truth), unit, rounded_score)
    assert error(run(triton, batch, cache), truth) <= FACTOR * floor


@given(spans=spans(), block_size=st.integers(1, 9), seed=st.integers(0, 99), dtype=st.sampled_from(list(UNIT)))
@settings(max_examples=10, deadline=None)
def test_any_layout_gives_the_same_bits(
    triton: Backend, spans: tuple[tuple[int, int], ...], block_size: int, seed: int, dtype: torch.dtype
) -> None:
    paged = Batch(spans=spans, block_size=block_size, seed=seed, dtype=dtype, kv_dtype=FP8, scores=Scores(0.25, 9, 5.0))
    assert torch.equal(run(triton, paged), run(triton, replace(paged, contiguous=True)))


def test_queries_may_lie_anywhere(triton: Backend) -> None:
    batch = Batch(spans=((3, 40), (7, 8)))
    wide = torch.cat((batch.query(), batch.query() + 1), dim=1)
    strided = wide[:, : batch.heads]
    assert not strided.is_contiguous()
    assert torch.equal(triton(strided, batch.cache(), batch.step(), batch.scores), run(triton, batch))


@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8])
@pytest.mark.parametrize("spans", [((30, 64), (41, 42)), ((50, 51), (29, 30))])
def test_what_no_token_may_see_is_not_read(
    triton: Backend, spans: tuple[tuple[int, int], ...], kv_dtype: torch.dtype
) -> None:
    batch = Batch(spans=spans, kv_dtype=kv_dtype, scores=Scores(0.25, window=11))
    cache, poisoned = batch.cache(), batch.cache()
    for table, (start, _) in zip(batch.tables(), spans, strict=True):
        for position in range(start - 11 + 1):
            poison(poisoned, table, position)
    found = run(triton, batch, poisoned)
    assert not found.isnan().any()
    assert torch.equal(found, run(triton, batch, cache))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_dtype", [torch.float32, FP8])
def test_a_slot_that_is_empty_shows_where_it_is_read(
    triton: Backend, kv_dtype: torch.dtype, window: int | None
) -> None:
    batch = Batch(spans=((20, 21), (0, 1), (30, 31)), kv_dtype=kv_dtype, scores=Scores(0.25, window))
    for position, sees in ((20, True), (18, True), (16, True), (15, window is None), (0, window is None)):
        cache = batch.cache()
        poison(cache, batch.tables()[0], position)
        expected = [sees, False, False]
        assert run(triton, batch, cache).isnan().all(-1).all(-1).tolist() == expected, position


def test_every_fp8_number_is_read_right(triton: Backend) -> None:
    batch = Batch(spans=((0, 1),), heads=1, kv_heads=1, head_dim=256, kv_dtype=FP8)
    cache, slot = batch.cache(), batch.tables()[0][0] * batch.block_size
    assert cache.values.scales is not None
    cache.values.data[slot, 0] = torch.arange(256, dtype=torch.uint8).view(FP8)
    cache.values.scales[slot] = 1.0
    found = run(triton, batch, cache)[0, 0]
    assert torch.equal(found.nan_to_num(1e9), cache.values.data[slot, 0].float().nan_to_num(1e9))
    assert found.isnan().sum() == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_cache_of_more_than_two_billion_numbers() -> None:
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("the GPU has less than 16 GiB free")
    device, head_dim, block_size = torch.device("cuda"), 256, 16
    blocks = 2**31 // (head_dim * block_size) + 2
    keys, values = (Slots(blocks * block_size, 1, head_dim, dtype=FP8, device=device) for _ in range(2))
    cache = PagedCache(keys, values, block_size)
    chunk = Chunk(tokens=[0] * 20, start=0, table=[blocks - 1, blocks - 2], prompt=20, sample=True)
    step = Step.make(Plan([chunk]), block_size=block_size, device=device)
    query, key, value = torch.randn(3, 20, 1, head_dim, device=device)
    cache.write(key, value, step)
    found, expected = (f(query, cache, step, Scores(0.1)) for f in (paged_attention, gather_attention))
    torch.testing.assert_close(found, expected)


def poison(cache: Cache, table: list[int], position: int) -> None:
    slot = table[position // cache.block_size] * cache.block_size + position % cache.block_size
    cache.keys.poison(slice(slot, slot + 1))
    cache.values.poison(slice(slot, slot + 1))


@given(spans=spans(), heads=st.integers(1, 130), rows=st.sampled_from([32, 64]))
@settings(max_examples=50, deadline=None)
def test_tiles_hold_every_token_once(spans: tuple[tuple[int, int], ...], heads: int, rows: int) -> None:
    step = Batch(spans=spans).step()
    tile_heads = power_of_two(heads)
    tiles = Tiles.make(step, rows=rows, tile_heads=tile_heads)
    found = [
        (first + n, start + n, tiles.tables[table : table + (start + n) // 4 + 1].tolist())
        for first, tokens, start, table in tiles.places.tolist()
        for n in range(tokens)
    ]
    tables = [c.table for c, where in zip(step.chunks, step.rows, strict=True) for _ in range(where.stop - where.start)]
    expected = [(n, p, t[: p // 4 + 1]) for n, (p, t) in enumerate(zip(step.positions.tolist(), tables, strict=True))]
    assert found == expected
    assert max(tiles.places[:, 1].tolist()) <= tiles.tokens
    assert 16 <= tiles.tokens * tile_heads <= max(rows, tile_heads)
