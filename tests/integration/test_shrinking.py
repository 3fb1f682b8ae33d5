"""A fault that shows only under a condition shrinks to the smallest workload that can show it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import find, settings

import paritykit as pk
from paritykit.checks import CHECKS
from paritykit.checks.base import InvarianceCheck
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.runner import Session
from paritykit.strategies import workloads
from paritykit.testing.faults import FAULTS
from tests.faulty import VOCABULARY, homes, model_of
from tests.nano import one_thread

pytestmark = pytest.mark.deep
BLOCK = 32
WINDOW = 16


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(("check", "fault", "smallest"), [
    ("decode_prefill", "position-shift-in-decode", ["len-1+2"]),
    ("decode_prefill", "kv-offset-not-advanced", ["len-1+2"]),
    ("decode_prefill", "window-missing-in-decode", [f"len-{WINDOW + 1}"]),
    ("batching", "kv-table-rows-swapped", ["len-1", "len-1@b"]),
    ("chunking", "position-restart-in-chunk", ["len-2"]),
])  # fmt: skip
def test_a_failure_shrinks_to_what_can_show_it(check: str, fault: str, smallest: list[str]) -> None:
    planted = FAULTS.get(fault)
    home, layer = next(iter(homes(planted).items()))
    model = str(model_of(home))
    own = {"provenance": False, "block_size": BLOCK, **planted.arguments(layer=layer)}
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
            answer = session.vary(question, workload.resolve(vocab_size=VOCABULARY))
            return any(f.verdict == "fail" for f in answer.findings)

        few = settings(max_examples=300, derandomize=True, deadline=None, database=None)
        found = find(workloads(block_size=BLOCK, window=WINDOW, longest=40), fails, settings=few)
    assert found.ids() == smallest
