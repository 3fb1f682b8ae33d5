"""Requests: prompt lengths around what breaks engines, ragged batches, shared prefixes, the same request twice."""

from __future__ import annotations

from hypothesis import strategies as st

from paritykit.case import CaseSet
from paritykit.sized import TEXTS, case_name, numbered

LONG = 257
"""Two blocks of vLLM's default size on a CPU, and a token."""


def edges(*, block_size: int = 16, window: int = 0, chunk: int = 0, longest: int = LONG) -> list[int]:
    """Prompt lengths around what breaks engines, ascending: one, two, and the edges of blocks, window and chunks.

    >>> edges(block_size=16, window=8, longest=40)
    [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40]
    """
    found = {1, 2, longest}
    for size in (block_size, 2 * block_size, window, chunk, 2 * chunk):
        found |= {size - 1, size, size + 1} if size else set()
    return sorted(n for n in found if 0 < n <= longest)


def lengths(*, block_size: int = 16, window: int = 0, chunk: int = 0, longest: int = LONG) -> st.SearchStrategy[int]:
    """Prompt lengths: as often at edges as anywhere; shrinks to the shortest."""
    near = edges(block_size=block_size, window=window, chunk=chunk, longest=longest)
    return st.sampled_from(sorted([*range(1, longest + 1), *near * (longest // len(near))]))


@st.composite
def workloads(
    draw: st.DrawFn,
    *,
    block_size: int = 16,
    window: int = 0,
    chunk: int = 0,
    longest: int = LONG,
    max_requests: int = 4,
    max_new_tokens: int = 4,
) -> CaseSet:
    """Some requests of ragged lengths, with some tokens after them, chosen by the engine or fed to it.

    Several are of one text, or of texts that part at such a length; some come twice. Token ids are spread over the
    whole vocabulary, its last id and those next to the edges of shards among them.
    """
    limits = {"block_size": block_size, "window": window, "chunk": chunk, "longest": longest}
    forks = [f"{TEXTS[0]}{place}{TEXTS[1]}" for place in edges(**limits)]
    after = [(new, fed) for new in range(max_new_tokens + 1) for fed in (False, True)[: new + 1]]
    one = st.tuples(
        lengths(**limits), st.sampled_from(after), st.sampled_from([*TEXTS * len(forks), *forks]), st.integers(1, 2)
    )
    drawn = draw(st.lists(one, min_size=1, max_size=max_requests))
    names = [case_name(size, new, text, forced=fed) for size, (new, fed), text, times in drawn for _ in range(times)]
    return CaseSet(numbered(names[:max_requests]))
