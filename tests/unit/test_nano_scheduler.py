"""The scheduler, without a model: budget, seats, chunks, preemption, order."""

from __future__ import annotations

from paritykit.engines.nano.blocks import BlockManager
from paritykit.engines.nano.request import Request
from paritykit.engines.nano.scheduler import Scheduler


def scheduler(*, blocks: int = 100, seats: int = 8, budget: int = 100, caching: bool = False) -> Scheduler:
    manager = BlockManager(blocks, 2, prefix_caching=caching)
    return Scheduler(manager, max_num_seqs=seats, max_num_batched_tokens=budget)


def add(target: Scheduler, name: str, length: int, *, max_tokens: int = 4) -> Request:
    request = Request(id=name, prompt=tuple(range(length)), max_tokens=max_tokens)
    target.add(request)
    return request


def advance(target: Scheduler) -> list[tuple[str, int, int, bool]]:
    """One step with token 0 chosen everywhere: (request, start, end, sampled) of every chunk."""
    scheduled, plan = target.plan()
    assert plan.chunks == [c for _, c in scheduled]
    for request, chunk in scheduled:
        request.computed = chunk.end
        target.blocks.seal(request.id, request.tokens, request.computed)
        if chunk.sample:
            request.accept(0)
        if request.finished:
            target.remove(request)
    return [(r.id, c.start, c.end, c.sample) for r, c in scheduled]


def test_prefill_then_decode_beside_a_newcomer() -> None:
    target = scheduler()
    add(target, "a", 5, max_tokens=3)
    assert advance(target) == [("a", 0, 5, True)]
    add(target, "b", 3, max_tokens=1)
    assert advance(target) == [("a", 5, 6, True), ("b", 0, 3, True)]
    assert advance(target) == [("a", 6, 7, True)]
    assert advance(target) == []
    assert len(target.blocks.free) == 100


def test_long_prompts_are_cut_by_the_budget() -> None:
    target = scheduler(budget=4)
    add(target, "a", 6)
    add(target, "b", 5)
    assert advance(target) == [("a", 0, 4, False)]
    assert advance(target) == [("a", 4, 6, True), ("b", 0, 2, False)]
    assert advance(target) == [("a", 6, 7, True), ("b", 2, 5, True)]


def test_seats_are_kept_to() -> None:
    target = scheduler(seats=1)
    add(target, "a", 2, max_tokens=2)
    add(target, "b", 2)
    assert [advance(target)[0][0] for _ in range(3)] == ["a", "a", "b"]


def test_only_a_prompt() -> None:
    target = scheduler()
    add(target, "a", 3, max_tokens=0)
    assert advance(target) == [("a", 0, 3, False)]
    assert not target.running


def test_the_last_to_come_gives_way_and_is_computed_anew() -> None:
    target = scheduler(blocks=4)
    first, last = add(target, "a", 4, max_tokens=4), add(target, "b", 4, max_tokens=3)
    assert advance(target) == [("a", 0, 4, True), ("b", 0, 4, True)]
    assert advance(target) == [("a", 4, 5, True)]
    assert (last.preemptions, last.computed, len(last.tokens)) == (1, 0, 5)
    steps = []
    while target.running or target.waiting:
        steps += advance(target)
    assert next(s for s in steps if s[0] == "b") == ("b", 0, 5, True)
    assert len(first.chosen) == 4
    assert len(last.chosen) == 3
    assert len(target.blocks.free) == 4


def test_preempted_requests_come_back_in_order() -> None:
    target = scheduler(blocks=6)
    for name in "abc":
        add(target, name, 4, max_tokens=9)
    advance(target)
    advance(target)
    assert [r.id for r in target.running] == ["a", "b"]
    target.preempt(target.running[1])
    assert [r.id for r in target.waiting] == ["b", "c"]


def test_a_cached_prompt_still_computes_its_last_token() -> None:
    target = scheduler(caching=True)
    add(target, "a", 6)
    advance(target)
    add(target, "b", 6)
    assert ("b", 5, 6, True) in advance(target)


def test_forced_tokens_are_fed_and_choices_kept() -> None:
    request = Request(id="a", prompt=(1, 2), max_tokens=3, forced=(7,))
    request.computed = 2
    for token in (5, 6, 8):
        request.accept(token)
    assert request.tokens == [1, 2, 7, 6]
    assert request.chosen == [5, 6, 8]
    assert request.finished


def test_a_stop_token_ends_a_request() -> None:
    request = Request(id="a", prompt=(1,), max_tokens=9, stop=frozenset({4}), computed=1)
    request.accept(3)
    assert not request.finished
    request.accept(4)
    assert request.finished


def test_a_fork_goes_on_where_its_parent_is() -> None:
    target = scheduler(seats=2)
    parent = add(target, "a", 3)
    child, other = (
        Request(id=n, prompt=parent.prompt, max_tokens=4, tokens=list(parent.tokens)) for n in ("fork", "other")
    )
    target.fork(parent, other)
    assert list(target.waiting) == [parent, other]
    target.remove(other)
    advance(target)
    child.tokens, child.chosen = list(parent.tokens), list(parent.chosen)
    target.fork(parent, child)
    assert advance(target) == [("a", 3, 4, True), ("fork", 3, 4, True)]
    assert target.blocks.table("a")[0] == target.blocks.table("fork")[0]
    assert target.blocks.table("a")[1] != target.blocks.table("fork")[1]
