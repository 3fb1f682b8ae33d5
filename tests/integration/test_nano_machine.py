"""Random schedules: whatever is added, stepped, aborted, preempted, forked and shared, each request gets what it gets
alone on the contiguous cache, and no block leaks, is aliased, or is read after it was freed.

``PARITYKIT_DEEP=1`` in the environment looks longer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paritykit.engines.nano.core import NanoLLM
from paritykit.engines.nano.request import Request
from paritykit.testing import tiny_model
from tests.nano import Told, drive, one_thread, poison_free_blocks

WORST = 1e-5
DEEP = os.environ.get("PARITYKIT_DEEP") == "1"
FAMILIES = ("mistral", "gemma2")
STEMS = ((3, 1, 4, 1, 5, 9, 2, 6), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3), (2, 7, 1, 8), ())
LONGEST = 32
WHICH = st.integers(0, 3)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@cache
def reference(family: str) -> NanoLLM:
    return NanoLLM(model_of(family), kv="contiguous", max_num_seqs=1)


@cache
def model_of(family: str) -> Any:
    return tiny_model(family, num_hidden_layers=2, sliding_window=6)


@cache
def alone(family: str, prompt: tuple[int, ...], max_tokens: int, forced: tuple[int, ...]) -> Told:
    return drive(reference(family), [prompt], max_tokens=max_tokens, forced=forced)[0]


class Schedules(RuleBasedStateMachine):
    """The engine, and beside it what every request was told so far."""

    @initialize(
        family=st.sampled_from(FAMILIES),
        block_size=st.sampled_from([3, 4, 2, 1, 16]),
        spare=st.integers(0, 9),
        budget=st.sampled_from([64, 16, 5, 1]),
        seats=st.sampled_from([6, 4, 2, 1]),
        caching=st.sampled_from([True, False]),
    )
    def start(self, *, family: str, block_size: int, spare: int, budget: int, seats: int, caching: bool) -> None:
        self.family = family
        self.told: dict[str, Told] = {}
        self.asked: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]] = {}
        self.llm = NanoLLM(
            model_of(family),
            block_size=block_size,
            num_blocks=-(-LONGEST // block_size) + spare,
            max_num_batched_tokens=budget,
            max_num_seqs=seats,
            enable_prefix_caching=caching,
        )

    @rule(
        stem=st.sampled_from(STEMS),
        tails=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=3),
        max_tokens=st.sampled_from([9, 5, 2, 1, 0]),
        steps=st.integers(0, 4),
        recorded=st.booleans(),
    )
    def add(
        self, *, stem: tuple[int, ...], tails: list[list[int]], max_tokens: int, steps: int, recorded: bool
    ) -> None:
        """Requests that are recorded compute even what is cached, from the cache."""
        for tail in tails:
            name = self.llm.add_request((*stem, *tail), max_tokens=max_tokens, label=0 if recorded else -1)
            self.told[name], self.asked[name] = Told(), ((*stem, *tail), max_tokens, ())
        self.step(steps)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.llm.step():
                self.told[output.id].take(output)
                if output.finished:
                    self.check(output.id)
            poison_free_blocks(self.llm)

    @precondition(lambda self: self.llm.unfinished)
    @rule(which=WHICH)
    def abort(self, which: int) -> None:
        self.llm.abort(self.pick(which).id)
        poison_free_blocks(self.llm)

    @precondition(lambda self: self.llm.scheduler.running)
    @rule(which=WHICH)
    def preempt(self, which: int) -> None:
        self.llm.preempt(self.pick(which).id)
        poison_free_blocks(self.llm)

    @precondition(lambda self: self.llm.scheduler.running)
    @rule(which=WHICH, forced=st.lists(st.integers(0, 1), min_size=1, max_size=2), steps=st.integers(0, 4))
    def fork(self, which: int, forced: list[int], steps: int) -> None:
        parent = self.pick(which)
        forced = forced[: max(0, parent.max_tokens - len(parent.tokens) + len(parent.prompt))]
        name = self.llm.fork(parent.id, forced=forced)
        told, (prompt, max_tokens, _) = self.told[parent.id], self.asked[parent.id]
        self.told[name] = Told(list(told.tokens), list(told.logits))
        self.asked[name] = (prompt, max_tokens, (*parent.tokens[len(prompt) :], *forced))
        self.step(steps)

    def pick(self, which: int) -> Request:
        unfinished = [*self.llm.scheduler.running, *self.llm.scheduler.waiting]
        return unfinished[which % len(unfinished)]

    @invariant()
    def every_block_has_its_holders(self) -> None:
        if not hasattr(self, "llm"):
            return
        blocks, scheduler = self.llm.blocks, self.llm.scheduler
        tables = {r.id: blocks.table(r.id) for r in scheduler.running}
        held = Counter(b for table in tables.values() for b in table)
        assert [held[b] for b in range(len(blocks.references))] == blocks.references
        assert sorted(blocks.free) == [b for b, count in enumerate(blocks.references) if not count]
        assert all(len(set(table)) == len(table) for table in tables.values())
        assert not any(blocks.table(r.id) or r.computed for r in scheduler.waiting)
        shared = {b for b, count in held.items() if count > 1}
        for table in tables.values():
            assert all(b in shared or held[b] == 1 for b in table)

    def teardown(self) -> None:
        if not hasattr(self, "llm"):
            return
        bound = 1000
        while self.llm.unfinished:
            self.step(1)
            bound -= 1
            assert bound, "the requests never end"
        assert not any(self.llm.blocks.references)
        assert len(self.llm.blocks.free) == self.llm.settings.num_blocks

    def check(self, name: str) -> None:
        prompt, max_tokens, forced = self.asked[name]
        if max_tokens:
            assert alone(self.family, prompt, max_tokens, forced).error(self.told[name]) < WORST
        else:
            assert not self.told[name].tokens


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=1000 if DEEP else 80,
    stateful_step_count=60 if DEEP else 30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
