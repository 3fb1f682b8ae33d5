"""What vLLM is told of the machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paritykit.engines.vllm.limits import binding


@given(ranks=st.integers(1, 8), cores=st.lists(st.integers(0, 63), unique=True, min_size=1, max_size=8))
def test_each_rank_has_a_core_that_there_is_or_none_is_bound(ranks: int, cores: list[int]) -> None:
    told = binding(ranks, cores)
    if len(cores) < ranks:
        assert told == "nobind"
    else:
        bound = [int(core) for core in told.split("|")]
        assert len(set(bound)) == ranks
        assert set(bound) <= set(cores)
