"""Rules from where weights landed: columns, ranks, replicas, and what is said otherwise."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from paritykit.mapping.build import Mapping, build_mapping
from paritykit.mapping.landed import merge_blocks
from paritykit.mapping.rules import Block
from paritykit.mapping.user import UserRule
from paritykit.provenance.weightmap import Landing, Span
from tests.made import manifest

WIDTH = 6
OURS = {"block.q": 8, "block.k": 4, "block.v": 4, "block.out": WIDTH}
PARAMETERS = {f"{m}.weight": f"{m}.weight" for m in OURS}
FEATURES = dict.fromkeys(PARAMETERS, 0)


def rows(tensor: str, parameter: str, source: tuple[int, int], start: int, *, rank: int = 0) -> Landing:
    """Rows of a tensor in rows of a parameter."""
    first, count = source
    return Landing(
        tensor=f"{tensor}.weight",
        parameter=f"{parameter}.weight",
        rank=rank,
        source=(Span(first, count), Span(0, WIDTH)),
        target=(Span(start, count), Span(0, WIDTH)),
        axes=(0, 1),
    )


FUSED = [
    rows("block.q", "engine.fused", (0, 8), 0),
    rows("block.k", "engine.fused", (0, 4), 8),
    rows("block.v", "engine.fused", (0, 4), 12),
    rows("block.out", "engine.o", (0, WIDTH), 0),
]


def build(
    landings: list[Landing], theirs: dict[str, int], *, ranks: int = 1, rules: Any = None, **facts: Any
) -> Mapping:
    ours = manifest(OURS, facts={"parameters": PARAMETERS, "features": FEATURES})
    found = {"landings": msgspec.to_builtins(landings), **facts}
    return build_mapping(ours, manifest(theirs, facts=found, ranks=ranks), user=rules)


def blocks(mapping: Mapping) -> dict[str, tuple[str, tuple[Block, ...]]]:
    return {r.reference: (r.candidate, r.blocks) for r in mapping.rules}


def test_columns_follow_the_rows_of_the_weight() -> None:
    mapping = build(FUSED, {"engine.fused": 16, "engine.o": WIDTH})
    assert blocks(mapping) == {
        "block.q": ("engine.fused", (Block(0, 0, 8),)),
        "block.k": ("engine.fused", (Block(0, 8, 4),)),
        "block.v": ("engine.fused", (Block(0, 12, 4),)),
        "block.out": ("engine.o", ()),
    }
    assert {r.source for r in mapping.rules} == {"weight provenance"}
    assert mapping.unmatched == []


def test_interleaved_heads_are_put_in_order() -> None:
    """Per head a row block of q, then of k: two heads."""
    parts = [("block.q", 0, 0), ("block.q", 4, 6)]
    landings = [rows(n, "engine.fused", (s, 4), t) for n, s, t in parts]
    landings += [rows("block.k", "engine.fused", (s, 2), t) for s, t in ((0, 4), (2, 10))]
    found = blocks(build(landings, {"engine.fused": 12}))
    assert found["block.q"] == ("engine.fused", (Block(0, 0, 4), Block(0, 6, 4)))
    assert found["block.k"] == ("engine.fused", (Block(0, 4, 2), Block(0, 10, 2)))


def test_shards_and_a_replica_of_two_ranks() -> None:
    landings = [rows("block.q", "engine.fused", (4 * r, 4), 0, rank=r) for r in (0, 1)]
    landings += [rows("block.k", "engine.fused", (0, 4), 4, rank=r) for r in (0, 1)]
    found = blocks(build(landings, {"engine.fused": 8}, ranks=2))
    assert found["block.q"] == ("engine.fused", (Block(0, 0, 4), Block(1, 0, 4)))
    assert found["block.k"] == ("engine.fused", (Block(0, 4, 4),))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_slice_that_landed_nowhere_gives_no_columns(lost: int) -> None:
    landings = [rows("block.q", "engine.fused", (4 * part, 4), 4 * part) for part in (0, 1) if part != lost]
    mapping = build(landings, {"engine.fused": 8})
    assert blocks(mapping)["block.q"] == ("engine.fused", ())


def test_a_module_without_an_output_is_found_in_the_one_around_it() -> None:
    landings = [rows("block.out", "engine.moe.inner", (0, WIDTH), 0)]
    assert blocks(build(landings, {"engine.moe": WIDTH}))["block.out"] == ("engine.moe", ())
    shared = [*landings, rows("block.q", "engine.moe.gate", (0, 8), 0)]
    assert "block.out" not in blocks(build(shared, {"engine.moe": WIDTH}))


def test_a_module_with_matrices_of_several_stands_for_none() -> None:
    landings = [rows("block.q", "engine", (0, 8), 0), rows("block.out", "engine", (0, WIDTH), 0)]
    landings = [msgspec.structs.replace(x, parameter=f"engine.{n}") for x, n in zip(landings, ("a", "b"), strict=True)]
    assert blocks(build(landings, {"engine": 8})) == {}


def test_a_declared_rule_wins_and_the_disagreement_is_told() -> None:
    names = {"block.q.weight": ("engine.fused.weight", "q"), "block.k.weight": ("engine.fused.weight", "k")}
    fused = {"engine.fused": [{"total": 4, "local": 4, "replicas": 1}] * 2}
    ours = manifest({"block.q": 4, "block.k": 4}, facts={"parameters": PARAMETERS, "features": FEATURES})
    swapped = [rows("block.q", "engine.fused", (0, 4), 4), rows("block.k", "engine.fused", (0, 4), 0)]
    facts = {"landings": msgspec.to_builtins(swapped), "names": names, "fused": fused}
    mapping = build_mapping(ours, manifest({"engine.fused": 8}, facts=facts))
    assert blocks(mapping)["block.q"] == ("engine.fused", (Block(0, 0, 4),))
    assert [(d.reference, d.declared, d.landed) for d in mapping.disagreements] == [
        ("block.q", "engine.fused columns 0:4", "engine.fused columns 4:8"),
        ("block.k", "engine.fused columns 4:8", "engine.fused columns 0:4"),
    ]


@pytest.mark.parametrize(("columns", "told"), [((8, 12), []), ((12, 16), ["engine.fused columns 12:16"])])
def test_a_rule_of_the_users_is_held_against_the_weights(columns: tuple[int, int], told: list[str]) -> None:
    rule = UserRule(reference="block.k", candidate="engine.fused", columns=columns)
    mapping = build(FUSED, {"engine.fused": 16, "engine.o": WIDTH}, rules=[rule])
    assert blocks(mapping)["block.k"] == ("engine.fused", (Block(0, columns[0], 4),))
    assert [d.declared for d in mapping.disagreements] == told


def test_neighbours_are_merged() -> None:
    assert merge_blocks((Block(0, 0, 2), Block(0, 2, 2), Block(1, 4, 2))) == (Block(0, 0, 4), Block(1, 4, 2))
    assert merge_blocks(()) == ()


def test_a_guess_by_the_longest_name_is_outranked_by_where_the_weights_are() -> None:
    """An engine that declares nothing: the nearest module by name is the one around, and not what holds the weights."""
    theirs = {"block": 16, "block.fused": 16, "block.o": WIDTH}
    moved = [msgspec.structs.replace(x, parameter=x.parameter.replace("engine", "block")) for x in FUSED]
    names = {tensor: (tensor, "") for tensor in PARAMETERS}
    mapping = build(moved, theirs, names=names)
    assert mapping.disagreements == []
    assert blocks(mapping)["block.k"] == ("block.fused", (Block(0, 8, 4),))
    guessed = {r.reference: r.source for r in build([], theirs, names=names).rules}
    assert guessed == {}
    alone = build([], {"block": 8, "block.o": WIDTH}, names=names)
    assert {r.reference: (r.candidate, r.source) for r in alone.rules} == {"block.q": ("block", "nearest name")}
