"""Hypothesis strategies for parity: workloads around what breaks engines, and ways to run them.

::

    @given(workload=pk.strategies.workloads(block_size=16))
    def test_batching(parity, workload):
        parity.hold("batching", workload)

What they draw is small when shrunk: one request or two, the shortest texts that still show the difference, by names
that ``paritykit run --case`` takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from paritykit.case import CaseSet

TEXTS = ("a", "b")
"""Cases of one text begin alike, so that prefixes are shared."""
LONG = 200


def edges(*, block_size: int = 16, window: int = 0, chunk: int = 0, longest: int = LONG) -> list[int]:
    """Prompt lengths around what breaks engines, ascending: one, two, and the edges of blocks, window and chunks.

    >>> edges(block_size=16, window=8, longest=40)
    [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40]
    """
    found = {1, 2, longest}
    for size in (block_size, 2 * block_size, window, chunk):
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
    """Some requests of ragged lengths, several of one text (shared prefixes), with some tokens generated after them.

    Token ids are spread over the whole vocabulary, its last id and the edge of a two-way shard among them.
    """
    size = lengths(block_size=block_size, window=window, chunk=chunk, longest=longest)
    one = st.tuples(size, st.integers(0, max_new_tokens), st.sampled_from(TEXTS))
    drawn = draw(st.lists(one, min_size=1, max_size=max_requests, unique=True))
    return CaseSet([case_name(*parts) for parts in drawn])


def case_name(length: int, new_tokens: int = 0, text: str = TEXTS[0]) -> str:
    """The name of a sized case.

    >>> case_name(17, 2, "b"), case_name(5)
    ('len-17+2@b', 'len-5')
    """
    return f"len-{length}" + (f"+{new_tokens}" if new_tokens else "") + (f"@{text}" if text != TEXTS[0] else "")


def conditions(
    *,
    block_sizes: Sequence[int] = (1, 3, 16, 32),
    budgets: Sequence[int] = (1, 7, 64, 2048),
    prefix_caching: Sequence[bool] = (False, True),
    parallel: Sequence[int] = (1,),
) -> st.SearchStrategy[dict[str, object]]:
    """Arguments of an engine that change how it runs and must not change what it gives.

    The first of each sequence is what a failure shrinks to: put the plain one there.
    """
    return st.fixed_dictionaries(
        {
            "block_size": st.sampled_from(block_sizes),
            "max_num_batched_tokens": st.sampled_from(budgets),
            "enable_prefix_caching": st.sampled_from(prefix_caching),
            "tensor_parallel_size": st.sampled_from(parallel),
        }
    )
