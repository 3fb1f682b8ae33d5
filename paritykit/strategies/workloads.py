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
    """Prompt lengths: mostly at edges, else any; shrinks to the shortest."""
    near = st.sampled_from(edges(block_size=block_size, window=window, chunk=chunk, longest=longest))
    return near | st.integers(1, longest)


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
    size = lengths(block_size=block_size, window=window, chunk=chunk, longest=longest)
    text = st.sampled_from(TEXTS) | size.map(lambda place: f"{TEXTS[0]}{place}{TEXTS[1]}")
    one = st.builds(case_name, size, st.integers(0, max_new_tokens), text, forced=st.booleans())
    return CaseSet(numbered(draw(st.lists(one, min_size=1, max_size=max_requests))))
