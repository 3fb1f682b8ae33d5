"""A watched cache: quiet while every slot is written with its position, and any other byte is told with its place."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.manifest import Segment
from paritykit.engines.shelf import Shelf, row_slots
from paritykit.engines.slots import SlotWatch
from paritykit.engines.strays import Access, Stray, Watched, cache_facts, shared_blocks
from paritykit.invariance.compare import View
from paritykit.invariance.outside import stray_findings, unwatched
from tests.made import manifest, write_capture

FILL, BYTE = 3e4, 200
few = settings(max_examples=40, deadline=None)
DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


@dataclass
class Pool:
    """Keys and values of one layer, ``[blocks, slots, width]`` each, the same number everywhere at first."""

    blocks: int
    size: int
    width: int
    dtype: torch.dtype = torch.float32
    layers: tuple[str, ...] = ("attn",)
    known: bool = True
    pair: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.blocks, self.size, self.width)
        self.pair = [torch.full(shape, FILL if self.dtype != torch.uint8 else BYTE, dtype=self.dtype) for _ in range(2)]

    def shelf(self) -> Shelf:
        slots = tuple(row_slots(self.size, self.width) + part * self.size for part in range(2))
        return Shelf(self.layers, tuple(self.pair), self.size, slots=slots if self.known else None)

    def write(self, access: Access, *, value: float = 1.0) -> None:
        for slot in access.slots():
            for tensor in self.pair:
                tensor[slot // self.size, slot % self.size] = value


pools = st.builds(
    Pool, blocks=st.integers(2, 6), size=st.integers(1, 5), width=st.integers(1, 3), dtype=st.sampled_from(DTYPES)
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Pool, list[Access]]:
    """A request that computes its text in several steps, in blocks anywhere in the pool."""
    pool = draw(pools)
    table = draw(st.permutations(range(pool.blocks)))[: draw(st.integers(1, pool.blocks))]
    length = draw(st.integers(1, pool.size * len(table)))
    cuts = sorted(draw(st.sets(st.integers(1, length))) | {length})
    edges = zip([0, *cuts], cuts, strict=False)
    return pool, [Access(0, table, pool.size, start, end) for start, end in edges]


@few
@given(steps())
def test_quiet_while_each_writes_its_own(drawn: tuple[Pool, list[Access]]) -> None:
    pool, accesses = drawn
    watch = SlotWatch([pool.shelf()])
    for number, access in enumerate(accesses):
        pool.write(access, value=number + 1)
        watch.after_step([access])
    seen = watch.finish()
    assert (seen.strays, seen.steps, seen.layers) == ([], len(accesses), ["attn"])


@few
@given(steps(), st.data())
def test_any_other_byte_is_told_with_its_place(drawn: tuple[Pool, list[Access]], data: st.DataObject) -> None:
    """Of no block, of an earlier position, of a later one: whatever the step did not compute."""
    pool, accesses = drawn
    wrong = data.draw(st.integers(0, len(accesses) - 1))
    own = set(accesses[wrong].slots())
    others = [s for s in range(pool.blocks * pool.size) if s not in own]
    if not others:
        return
    slot, part = data.draw(st.sampled_from(others)), data.draw(st.integers(0, 1))
    watch = SlotWatch([pool.shelf()])
    for number, access in enumerate(accesses):
        pool.write(access, value=number + 1)
        if number == wrong:
            place = slot // pool.size, slot % pool.size, data.draw(st.integers(0, pool.width - 1))
            pool.pair[part][place] = 99
        watch.after_step([access])
    (stray,) = watch.finish().strays
    assert (stray.kind, stray.block, stray.offset) == ("foreign", slot // pool.size, slot % pool.size)
    assert (stray.part, stray.slots, stray.step) == (("key", "value")[part], 1, wrong)
    known = {s // pool.size for s in Access(0, accesses[wrong].table, pool.size, 0, accesses[wrong].end).slots()}
    assert stray.owner == (0 if slot // pool.size in known else -1)


@few
@given(steps(), st.data())
def test_a_position_that_is_not_written_is_told(drawn: tuple[Pool, list[Access]], data: st.DataObject) -> None:
    pool, accesses = drawn
    access = accesses[0]
    position, part = data.draw(st.integers(access.start, access.end - 1)), data.draw(st.integers(0, 1))
    watch = SlotWatch([pool.shelf()])
    pool.write(access)
    block, offset = access.table[position // pool.size], position % pool.size
    pool.pair[part][block, offset] = FILL if pool.dtype != torch.uint8 else BYTE
    watch.after_step([access])
    found = [(s.kind, s.block, s.offset, s.part) for s in watch.finish().strays]
    assert found == [("lost", block, offset, ("key", "value")[part])]


def test_numbers_that_are_not_numbers_are_compared_as_bits() -> None:
    pool = Pool(3, 2, 2)
    for tensor in pool.pair:
        tensor.fill_(float("nan"))
    watch = SlotWatch([pool.shelf()])
    pool.pair[0][2] = -0.0
    watch.after_step([])
    pool.pair[0][2] = 0.0
    watch.after_step([])
    assert [(s.block, s.slots, s.step) for s in watch.finish().strays] == [(2, 2, 0), (2, 2, 1)]


def test_what_comes_after_the_last_step_belongs_to_none() -> None:
    pool = Pool(3, 2, 2)
    watch = SlotWatch([pool.shelf()], rank=1)
    access = Access(4, [1], 2, 0, 1)
    pool.write(access)
    watch.after_step([access])
    pool.pair[1][1, 0] = 5
    (stray,) = watch.finish().strays
    assert (stray.cases, stray.block, stray.rank, stray.step) == ([], 1, 1, 1)


def test_copies_and_given_up_blocks() -> None:
    pool = Pool(4, 2, 1)
    watch = SlotWatch([pool.shelf()])
    access = Access(0, [2, 1], 2, 0, 4)
    pool.write(access)
    watch.after_step([access])
    pool.pair[0][3] = pool.pair[0][1]
    watch.adopt([3], size=2)
    watch.refill({0: [2, 3]}, sizes={0: 2})
    assert [float(t[b, 0, 0]) for t in pool.pair for b in range(4)] == [FILL, FILL, 1, 1, FILL, FILL, 1, FILL]
    assert watch.finish().strays == []


def test_blocks_of_the_scheduler_may_be_several_of_the_kernel() -> None:
    pool = Pool(6, 2, 1)
    watch = SlotWatch([pool.shelf()])
    access = Access(0, [2, 0], 4, 0, 6)
    pool.write(access)
    watch.adopt([1], size=4)
    watch.after_step([access])
    pool.pair[0][3, 1] = 2
    watch.after_step([Access(0, [2, 0], 4, 6, 6)])
    (stray,) = watch.finish().strays
    assert (stray.block, stray.offset, stray.owner) == (3, 1, -1)
    assert access.slots() == [8, 9, 10, 11, 0, 1]


def test_without_a_known_layout_blocks_are_told_apart() -> None:
    pool = Pool(4, 3, 2, known=False)
    watch = SlotWatch([pool.shelf()])
    access = Access(0, [2], 3, 0, 1)
    pool.pair[0][2, 2] = 1
    watch.after_step([access])
    pool.pair[0][1, 2] = 1
    watch.after_step([access])
    (stray,) = watch.finish().strays
    assert (stray.block, stray.offset, stray.part) == (1, -1, "")


def test_a_tensor_that_groups_share_is_written_by_all_of_them() -> None:
    pool = Pool(4, 2, 1, layers=("a", "b"))
    shelf = Shelf(pool.layers, tuple(pool.pair), 2, slots=pool.shelf().slots, groups=frozenset({0, 1}))
    watch = SlotWatch([shelf])
    accesses = [Access(0, [n + 1], 2, 0, 2, group=n) for n in range(2)]
    for access in accesses:
        pool.write(access)
    watch.after_step(accesses)
    watch.refill({0: [1], 1: []}, sizes={0: 2, 1: 2})
    assert float(pool.pair[0][2, 0, 0]) == FILL
    assert watch.finish().strays == []


def test_a_block_of_two_requests_is_shared_only_while_nobody_writes_to_it() -> None:
    read, write = Access(0, [3, 1], 2, 3, 4), Access(1, [3, 2], 2, 3, 4)
    assert list(shared_blocks([read, write])) == []
    thief = Access(1, [3, 1], 2, 2, 4)
    assert [b for b, _, _ in shared_blocks([read, thief])] == [1, 1]
    assert list(shared_blocks([read, thief._replace(group=1)])) == []
    hit = Access(1, [3, 1, 2], 2, 4, 5, reuses=True)
    assert list(shared_blocks([read, hit])) == []
    assert [b for b, _, _ in shared_blocks([read, hit._replace(reuses=False)])] == [1]
    assert [b for b, _, _ in shared_blocks([read, hit._replace(table=[1, 3, 2])])] == [1]
    assert [b for b, _, _ in shared_blocks([read, thief._replace(reuses=True)])] == [1, 1]
    behind = Access(0, [1, 3], 2, 2, 4, first=2)
    assert list(shared_blocks([behind, Access(1, [1], 2, 0, 2)])) == []
    pool = Pool(4, 2, 1)
    watch = SlotWatch([pool.shelf()])
    for access in (read, thief):
        pool.write(access)
    watch.after_step([read, thief])
    (stray,) = watch.finish().strays
    assert (stray.kind, stray.block, stray.owner) == ("shared", 1, 1)


def test_nothing_watched_is_no_fact_and_ranks_are_put_together() -> None:
    assert cache_facts([]) == cache_facts([None, None]) == {}
    ranks = [Watched(steps=2, layers=["a", "b"], unwatched={"c": "why"}), None, Watched(steps=2, layers=["b", "d"])]
    merged = cache_facts(ranks)["cache"]
    assert (merged["layers"], merged["unwatched"], merged["steps"]) == (["a", "b", "d"], {"c": "why"}, 2)


@pytest.fixture
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    strays = [
        Stray(layer="x.attn", kind="foreign", block=3, offset=1, slots=2, step=4, part="key", cases=[0], owner=0),
        Stray(layer="x.attn", kind="lost", block=2, offset=0, slots=1, step=5, cases=[0]),
    ]
    watched = Watched(steps=6, layers=["x.attn", "y.attn"], unwatched={"z.attn": "no"}, strays=strays)
    rows = {f"{n}.attn#key_cache": torch.ones(2, 1, 2) for n in "xyz"}
    facts = cache_facts([watched])
    capture = write_capture(tmp_path_factory.mktemp("c") / "c", [([Segment(0, 0, 2)], rows)], facts=facts)
    return View(capture, manifest({f"{n}.attn#key_cache": [1, 2] for n in "xyz"}))


def test_strays_become_findings_of_their_layer(view: View) -> None:
    from paritykit.diagnose.locate import Graph

    graph = Graph(manifest({"x.attn#key_cache": 2, "y.attn#key_cache": 2}))
    found = {f.point: f for f in stray_findings(view, graph, check="kv_cache", condition="poisoned")}
    assert {p: (f.verdict, f.value, f.origin) for p, f in found.items()} == {
        "x.attn#cache": ("fail", 3.0, "introduced"),
        "y.attn#cache": ("pass", 0.0, None),
    }
    assert found["x.attn#cache"].message == (
        "poisoned: key of block 3, offset 1 and 1 more slots, a block of a, was written, though no position of "
        "step 4 (a) belongs there; 1 more times"
    )
    assert found["x.attn#cache"].located == "x.attn"
    assert [(u.point, u.reason) for u in unwatched(view)] == [("z.attn#cache", "no")]
