"""A fault that shows only under a condition shrinks to the smallest workload that can show it, and is located there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import paritykit as pk
from paritykit.checks import CHECKS
from paritykit.checks.base import InvarianceCheck
from paritykit.diagnose.locate import first_divergence
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.invariance.explore import Ground, Profile, smallest_failing
from paritykit.session import Session
from paritykit.testing.faults import FAULTS
from tests.faulty import VOCABULARY, homes, model_of
from tests.nano import one_thread

BLOCK, WINDOW, LONGEST = 4, 16, 20
TWO, FOUR = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
CROWDED = {"num_blocks": 2}
"""Two requests of one block each, and no room for either to begin another."""


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def deep(*parts: Any) -> Any:
    return pytest.param(*parts, marks=pytest.mark.deep)


@pytest.mark.parametrize(("check", "fault", "smallest", "arguments"), [
    # several ranks; one position has one key, and its query says nothing
    ("tensor_parallel", "reduce-averages", [1], TWO),
    deep("tensor_parallel", "gate-up-cut-before-split", [1], TWO),
    deep("tensor_parallel", "queries-of-another-rank", [2], TWO),
    deep("tensor_parallel", "bias-on-every-rank", [1], TWO),
    deep("tensor_parallel", "vocabulary-shard-shifted", [1], TWO),
    deep("tensor_parallel", "kv-heads-replicated-in-turn", [1], FOUR),
    # decode
    ("decode_prefill", "position-shift-in-decode", [2], {}),
    ("decode_prefill", "kv-write-lost-at-new-block", [BLOCK + 1], {}),
    deep("decode_prefill", "window-missing-in-decode", [WINDOW + 1], {}),
    deep("decode_prefill", "attention-softcap-missing-in-decode", [2], {}),
    deep("decode_prefill", "kv-offset-not-advanced", [2], {}),
    deep("decode_prefill", "kv-padding-writes", [2], {}),
    # the edges of blocks; in blocks of one position every position is one
    ("batching", "kv-table-rows-swapped", [1, 1], {}),
    ("batching", "stale-after-preemption", [BLOCK + 1], CROWDED),
    deep("decode_prefill", "kv-slot-off-at-block-start", [BLOCK + 1], {}),
    deep("kv_cache", "kv-slot-off-at-block-start", [2], {}),
    deep("decode_prefill", "kv-partial-block-unread", [2], {}),
    deep("batching", "block-freed-early", [1, 1], {}),
    # prefix caching; a block is found again by its own tokens where another came before it
    ("prefix_cache", "prefix-hash-ignores-parent", [2 * BLOCK + 1], {}),
    deep("prefix_cache", "prefix-hit-too-long", [BLOCK + 1], {}),
    # batches; a request is also run beside itself
    ("batching", "kv-padding-writes-in-a-batch", [1], {}),
    deep("batching", "kv-lengths-mixed-up", [1, 2], {}),
    # chunks
    ("chunking", "position-restart-in-chunk", [2], {}),
])  # fmt: skip
def test_a_failure_shrinks_to_what_can_show_it(
    check: str, fault: str, smallest: list[int], arguments: dict[str, Any]
) -> None:
    """``smallest`` are the positions that each request computes."""
    planted = FAULTS.get(fault)
    home, layer = next(iter(homes(planted).items()))
    model = str(model_of(home))
    own = {"provenance": False, "block_size": BLOCK, **arguments, **planted.arguments(layer=layer)}
    question = CHECKS.get(check)
    assert isinstance(question, InvarianceCheck)
    with Session(
        reference=HFEngine(model),
        candidate=NanoEngine(model, **own),
        cases=pk.cases("len-2+1").resolve(vocab_size=VOCABULARY),
        checkpoint=Checkpoint.find(model),
        vary=lambda more: NanoEngine(model, **{**own, **more}),
    ) as session:

        def fails(workload: pk.CaseSet) -> bool:
            answer = session.vary(question, workload.resolve(vocab_size=VOCABULARY), located=False)
            return any(f.verdict == "fail" for f in answer.findings)

        longest = BLOCK + 1 if "num_blocks" in arguments else LONGEST
        ground = Ground(block_size=BLOCK, window=WINDOW, longest=longest)
        found = smallest_failing(fails, ground, name=fault, profile=Profile(examples=200))
        assert found is not None
        cases = found.resolve(vocab_size=VOCABULARY)
        assert sorted(c.positions for c in cases) == smallest, found.ids()
        first = first_divergence(session.vary(question, cases).findings)
    assert first is not None
    assert first.origin != "inherited"
    assert planted.at(layer=layer) in {place.partition("#")[0] for place in (first.point, first.seen_at)}
