"""Batches for attention backends, what they should give, and Triton's kernels run by its interpreter, for tests.

The interpreter has to be switched on before Triton is imported, and stays on: so it runs in a process of its own.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from hypothesis import strategies as st

from paritykit.engines.nano.attention import Backend, Scores, attend
from paritykit.engines.nano.kv import ContiguousCache, LayerCache, Slots
from paritykit.engines.nano.paged import PagedCache
from paritykit.engines.nano.step import Chunk, Plan, Step
from paritykit.engines.nano.triton_attention import Tiles, paged_attention

CPU = torch.device("cpu")
LONGEST = 64
SPARE = 3
"""Blocks that belong to nobody."""
FP8 = torch.float8_e4m3fn
QUARTER = Scores(0.25)
HAVE_TRITON = find_spec("triton") is not None
Cache = PagedCache | ContiguousCache


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests of which positions ``spans`` are computed now and all before are in the cache; numbers from ``seed``."""

    spans: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    contiguous: bool = False
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32
    scores: Scores = QUARTER
    seed: int = 0

    @property
    def slots_each(self) -> int:
        """Positions in a block."""
        return LONGEST if self.contiguous else self.block_size

    def normal(self, tokens: int, heads: int, *, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + seed)
        return torch.randn(tokens, heads, self.head_dim, generator=generator).to(self.dtype)

    def tables(self) -> list[list[int]]:
        """Blocks of every request, in no order."""
        counts = [-(-end // self.slots_each) for _, end in self.spans]
        blocks = torch.randperm(sum(counts) + SPARE, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return [[blocks.pop() for _ in range(n)] for n in counts]

    def step(self, *, whole: bool = False) -> Step:
        """The step that computes the spans, or all positions up to their ends."""
        spans = [(0, end) for _, end in self.spans] if whole else self.spans
        chunks = [
            Chunk(tokens=[0] * (end - start), start=start, table=table, prompt=end, sample=True)
            for table, (start, end) in zip(self.tables(), spans, strict=True)
        ]
        return Step.make(Plan(chunks), block_size=self.slots_each, device=CPU)

    def query(self) -> torch.Tensor:
        """``[tokens, heads, head_dim]``."""
        return self.normal(sum(end - start for start, end in self.spans), self.heads, seed=1)

    def cache(self) -> Cache:
        """A cache that holds every request's keys and values; NaN wherever it holds nothing."""
        blocks = sum(len(t) for t in self.tables()) + SPARE
        keys, values = (
            Slots(blocks * self.slots_each, self.kv_heads, self.head_dim, dtype=self.kv_dtype, device=CPU)
            for _ in range(2)
        )
        found = (ContiguousCache if self.contiguous else PagedCache)(keys, values, self.slots_each)
        step = self.step(whole=True)
        rows = len(step.ids)
        found.write(self.normal(rows, self.kv_heads, seed=2), self.normal(rows, self.kv_heads, seed=3), step)
        return found

    def truth(self, cache: Cache) -> torch.Tensor:
        """What attention should give, computed in float64 from what the cache holds."""
        step, query = self.step(), self.query()
        parts = []
        for chunk, rows in zip(step.chunks, step.rows, strict=True):
            keys, values = (t.double() for t in cache.read(chunk.table, chunk.end, self.dtype))
            parts.append(attend(query[rows].double(), keys, values, start=chunk.start, scores=self.scores))
        return torch.cat(parts)

    def largest_score(self, cache: Cache) -> float:
        """Of all queries and keys, before any cap or mask."""
        step, query, group = self.step(), self.query().double(), self.heads // self.kv_heads
        found = 0.0
        for chunk, rows in zip(step.chunks, step.rows, strict=True):
            keys = cache.read(chunk.table, chunk.end, self.dtype)[0].double().repeat_interleave(group, dim=1)
            found = max(found, float(torch.einsum("qhd,khd->hqk", query[rows], keys).abs().max()) * self.scores.scale)
        return found


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative, in the L2 norm over everything."""
    return float((found.double() - truth).norm() / truth.norm())


def spans(longest: int = LONGEST) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Prefill chunks that start anywhere, and decodes."""
    prefill = st.tuples(st.integers(0, longest - 1), st.integers(1, longest)).map(
        lambda pair: (pair[0], min(pair[0] + pair[1], longest))
    )
    decode = st.integers(0, longest - 1).map(lambda start: (start, start + 1))
    return st.lists(prefill | decode, min_size=1, max_size=3).map(tuple)


@st.composite
def any_batch(draw: st.DrawFn) -> Batch:
    """Any shape that a model may have."""
    dtype, kv_heads = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])), draw(st.integers(1, 3))
    window = draw(st.none() | st.integers(1, LONGEST))
    cap = draw(st.none() | st.sampled_from([0.5, 2.0, 50.0]))
    return Batch(
        spans=draw(spans()),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 7])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 16, 20, 24, 32, 96])),
        block_size=draw(st.integers(1, 9) | st.just(32)),
        contiguous=draw(st.booleans()),
        dtype=dtype,
        kv_dtype=draw(st.sampled_from([dtype, FP8, torch.float32, torch.bfloat16])),
        scores=Scores(draw(st.sampled_from([0.05, 0.25, 1.0])), window, cap),
        seed=draw(st.integers(0, 99)),
    )


@contextmanager
def interpreter() -> Iterator[Backend]:
    """The backend ``triton`` on the CPU."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=_switch_on) as pool:

        def backend(*arguments: object) -> torch.Tensor:
            found: torch.Tensor = _unpack(pool.submit(_interpret, _pack(arguments)).result())
            return found

        yield backend


def on_gpu(query: torch.Tensor, cache: LayerCache, step: Step, scores: Scores) -> torch.Tensor:
    """The backend ``triton`` on tensors moved to the GPU, and back."""
    assert isinstance(cache, PagedCache | ContiguousCache)
    device = torch.device("cuda")
    there = type(cache)(_moved(cache.keys, device), _moved(cache.values, device), cache.block_size)
    moved = replace(step, ids=step.ids.to(device), _made={})
    return paged_attention(query.to(device), there, moved, scores).cpu()


def _moved(slots: Slots, device: torch.device) -> Slots:
    count, kv_heads, head_dim = slots.data.shape
    found = Slots(count, kv_heads, head_dim, dtype=slots.data.dtype, device=device)
    found.data = slots.data.to(device)
    found.scales = None if slots.scales is None else slots.scales.to(device)
    return found


def _switch_on() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("error", RuntimeWarning)
    torch.set_num_threads(1)


def _interpret(arguments: bytes) -> bytes:
    query, cache, step, scores = _unpack(arguments)
    output = paged_attention(query, cache, step, scores)
    assert isinstance(step.once(paged_attention, dict), Tiles), "tiles are made once a step"
    return _pack(output)


def _pack(content: Any) -> bytes:
    """By torch: pickle alone cannot read fp8 back."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _unpack(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)
