"""The KV cache: any dtype, any block size; paged gives the bits of contiguous."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.engines.nano.attention import Scores, attend, gather_attention, mask_scores
from paritykit.engines.nano.kv import ContiguousCache, LayerCache, Slots
from paritykit.engines.nano.paged import PagedCache, gather_slots
from paritykit.engines.nano.step import Chunk, Plan, Step, slot_mapping

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 8


def slots(count: int, dtype: torch.dtype = torch.float32) -> Slots:
    return Slots(count, KV_HEADS, DIM, dtype=dtype, device=CPU)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_of(tables: list[list[int]], spans: list[tuple[int, int]], block_size: int) -> Step:
    chunks = [
        Chunk(tokens=[0] * (end - start), start=start, table=table, prompt=end, sample=True)
        for table, (start, end) in zip(tables, spans, strict=True)
    ]
    return Step.make(Plan(chunks), block_size=block_size, device=CPU)


@given(block_size=st.integers(1, 9), spans=st.lists(st.integers(1, 20), min_size=1, max_size=3), data=st.data())
@settings(max_examples=40, deadline=None)
def test_paged_gives_the_bits_of_contiguous(block_size: int, spans: list[int], data: st.DataObject) -> None:
    counts = [-(-n // block_size) for n in spans]
    blocks = data.draw(st.permutations(range(sum(counts) + 2)))
    tables = [list(blocks[sum(counts[:n]) : sum(counts[: n + 1])]) for n in range(len(spans))]
    paged: LayerCache = PagedCache(slots(len(blocks) * block_size), slots(len(blocks) * block_size), block_size)
    plain: LayerCache = ContiguousCache(slots(20 * len(spans)), slots(20 * len(spans)), 20)
    outputs = []
    for cache, tabled, size in ((paged, tables, block_size), (plain, [[n] for n in range(len(spans))], 20)):
        given_ = []
        for first in (True, False):
            cut = [(0, n // 2) if first else (n // 2, n) for n in spans]
            cut = [(a, b) for a, b in cut if b > a]
            used = [t for t, n in zip(tabled, spans, strict=True) if not first or n > 1]
            if not cut:
                continue
            step = step_of(used, cut, size)
            total = len(step.ids)
            cache.write(normal(total, KV_HEADS, DIM), normal(total, KV_HEADS, DIM, seed=1), step)
            given_.append(gather_attention(normal(total, HEADS, DIM, seed=2), cache, step, Scores(0.3, 7, 2.0)))
        outputs.append(torch.cat(given_))
    assert torch.equal(*outputs)
    assert not outputs[0].isnan().any()


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 0.0), (torch.float16, 2**-11), (torch.bfloat16, 2**-8), (torch.float8_e4m3fn, 2**-4)],
)
def test_a_cache_in_another_dtype_rounds_and_no_more(dtype: torch.dtype, error: float) -> None:
    cache, rows = slots(6, dtype), normal(4, KV_HEADS, DIM)
    index = torch.tensor([5, 0, 3, 2])
    cache.put(index, rows)
    found = cache.get(index, torch.float32)
    assert found.dtype == torch.float32
    assert ((found - rows).abs() <= rows.abs() * error + (rows.abs().amax(-1, keepdim=True) * error / 64)).all()
    assert cache.get(torch.tensor([1, 4]), torch.float32).isnan().all()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_fp8_is_scaled_for_every_row_and_head(size: float) -> None:
    cache, rows = slots(3, torch.float8_e4m3fn), normal(3, KV_HEADS, DIM)
    rows = rows * torch.tensor([1.0, 100.0, size])[:, None, None]
    cache.put(slice(0, 3), rows)
    relative = (cache.get(slice(0, 3), torch.float32) - rows).norm(dim=-1) / rows.norm(dim=-1)
    assert relative.max() < 0.05
    cache.move(slice(2, 3), slice(0, 1))
    assert torch.equal(cache.get(slice(0, 1), torch.float32), cache.get(slice(2, 3), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_poison(dtype: torch.dtype) -> None:
    cache = slots(4, dtype)
    cache.put(slice(0, 4), normal(4, KV_HEADS, DIM))
    cache.poison(slice(1, 3))
    assert cache.get(slice(0, 4), torch.float32).isnan().all(-1).all(-1).tolist() == [False, True, True, False]


def test_a_block_is_copied_whole() -> None:
    cache = PagedCache(slots(9), slots(9), 3)
    step = step_of([[1]], [(0, 3)], 3)
    key, value = normal(3, KV_HEADS, DIM), normal(3, KV_HEADS, DIM, seed=1)
    cache.write(key, value, step)
    cache.copy(1, 2)
    found = cache.read([2], 3, torch.float32)
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], value)
    assert cache.read([0], 3, torch.float32)[0].isnan().all()


def test_slot_mapping() -> None:
    assert slot_mapping([7, 2], 1, 4, 2) == [15, 4, 5]
    assert slot_mapping([3], 0, 0, 4) == []
    assert slot_mapping([7, 2], 0, 4, 2, cached=3) == [-1, -1, -1, 5]
    assert slot_mapping([7, 2], 1, 2, 2, cached=4) == [-1]
    assert gather_slots((7, 2, 0), 5, 2, CPU).tolist() == slot_mapping([7, 2, 0], 0, 5, 2)


@pytest.mark.parametrize(("tokens", "start"), [(4, 2), (2, 0), (1, 0), (1, 3)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_attention_is_softmax_over_what_may_be_seen(
    tokens: int, start: int, window: int | None, cap: float | None
) -> None:
    query = normal(tokens, HEADS, DIM)
    keys, values = (normal(start + tokens, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    found = attend(query, keys, values, start=start, scores=Scores(0.4, window, cap))
    for t in range(tokens):
        place = t + start
        seen = range(max(0, place - window + 1) if window else 0, place + 1)
        for head in range(HEADS):
            scores = torch.stack([query[t, head] @ keys[s, head // 2] * 0.4 for s in seen])
            weights = (scores if cap is None else cap * torch.tanh(scores / cap)).softmax(0)
            expected = sum(w * values[s, head // 2] for w, s in zip(weights, seen, strict=True))
            torch.testing.assert_close(found[t, head], expected)


def test_mask_scores() -> None:
    mask = mask_scores(2, 4, start=2, window=2, like=torch.zeros(1))
    never = float("-inf")
    assert mask.tolist() == [[never, 0, 0, never], [never, never, 0, 0]]
    assert mask_scores(1, 3, start=1, window=None, like=torch.zeros(1)).tolist() == [[0, 0, never]]
