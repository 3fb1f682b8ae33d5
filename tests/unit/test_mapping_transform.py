"""Splitting and joining are inverses, for any fused layout and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paritykit.mapping.rules import Block, Part, Rule, fused_blocks, sized_blocks
from paritykit.mapping.transform import apply_rule, join, split

ROWS = 3


@st.composite
def qkv(draw: st.DrawFn) -> tuple[list[Part], int]:
    """Parts of a fused qkv on some ranks; kv heads are shared where there are fewer of them than ranks."""
    ranks, head_dim = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 4))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    heads = kv_heads * draw(st.integers(1, 3))
    assume(heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0))
    replicas = max(1, ranks // kv_heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    return [Part(q, q // ranks), *[Part(kv, kv * replicas // ranks, replicas)] * 2], ranks


@st.composite
def merged(draw: st.DrawFn) -> tuple[list[Part], int]:
    """Parts of a gate_up, or of more."""
    ranks = draw(st.integers(1, 4))
    locals_ = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return [Part(n * ranks, n) for n in locals_], ranks


def loaded(parts: list[Part], ranks: int) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """Every part whole, and each rank's fused tensor as an engine would hold it, replicas included."""
    wholes = [torch.randn(ROWS, p.total) for p in parts]
    held = {}
    for rank in range(ranks):
        slices = [
            w[:, rank // p.replicas * p.local : (rank // p.replicas + 1) * p.local]
            for w, p in zip(wholes, parts, strict=True)
        ]
        held[rank] = torch.cat(slices, dim=1)
    return wholes, held


@given(qkv() | merged())
@settings(deadline=None, max_examples=200)
def test_every_part_is_found_again(layout: tuple[list[Part], int]) -> None:
    parts, ranks = layout
    wholes, held = loaded(parts, ranks)
    for number, whole in enumerate(wholes):
        assert torch.equal(join(held, fused_blocks(parts, ranks=range(ranks), wanted=number)), whole)
    assert torch.equal(join(held, fused_blocks(parts, ranks=range(ranks))), torch.cat(wholes, dim=1))


@given(qkv() | merged(), st.data())
@settings(deadline=None, max_examples=200)
def test_split_then_join_is_identity(layout: tuple[list[Part], int], data: st.DataObject) -> None:
    parts, ranks = layout
    wanted = data.draw(st.none() | st.integers(0, len(parts) - 1))
    blocks = fused_blocks(parts, ranks=range(ranks), wanted=wanted)
    whole = torch.randn(ROWS, sum(b.length for b in blocks))
    widths = dict.fromkeys(range(ranks), sum(p.local for p in parts))
    assert torch.equal(join(split(whole, blocks, widths=widths), blocks), whole)


@given(qkv() | merged())
@settings(deadline=None)
def test_join_then_split_is_identity_but_for_replicas(layout: tuple[list[Part], int]) -> None:
    parts, ranks = layout
    _, held = loaded(parts, ranks)
    blocks = fused_blocks(parts, ranks=range(ranks))
    again = split(join(held, blocks), blocks, widths={r: t.shape[1] for r, t in held.items()})
    for block in blocks:
        place = slice(block.start, block.start + block.length)
        assert torch.equal(again[block.rank][:, place], held[block.rank][:, place])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 8))
def test_sized_blocks_make_the_size_or_say_no(wanted: int, local: int, ranks: int) -> None:
    blocks = sized_blocks(wanted=wanted, local=local, ranks=range(ranks))
    if blocks == ():
        assert wanted == local
    elif blocks is not None:
        assert sum(b.length for b in blocks) == wanted
        assert all(b.start == 0 and b.length == local and b.rank < ranks for b in blocks)
        assert [b.rank for b in blocks] == sorted({b.rank for b in blocks})
    else:
        assert wanted != local


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 5))
def test_sized_blocks_know_shards_with_replicas(shards: int, replicas: int, local: int) -> None:
    ranks = shards * replicas
    whole = torch.randn(ROWS, shards * local)
    held = {r: whole[:, r // replicas * local : (r // replicas + 1) * local] for r in range(ranks)}
    blocks = sized_blocks(wanted=shards * local, local=local, ranks=range(ranks))
    assert blocks is not None
    assert torch.equal(join(held, blocks) if blocks else held[0], whole)


def test_rules_are_carried_out() -> None:
    tensors = {
        ("a", 0): torch.arange(12.0).reshape(2, 2, 3),
        ("b", 0): torch.full((2, 2, 3), 100.0),
        ("a", 1): torch.arange(12.0).reshape(2, 2, 3) + 50,
    }

    def run(**fields: Any) -> list[list[float]]:
        found: list[list[float]] = apply_rule(
            Rule(reference="r", candidate="a", **fields), lambda key, rank: tensors[key, rank or 0]
        ).tolist()
        return found

    assert run() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert run(transpose=True) == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]
    assert run(plus="b")[0] == [100, 101, 102, 103, 104, 105]
    assert run(plus="b", transpose=True)[0] == [100, 103, 101, 104, 102, 105]
    assert run(blocks=(Block(1, 4, 2), Block(0, 1, 1)))[0] == [54, 55, 1]


@pytest.mark.parametrize(("rule", "text"), [
    (Rule(reference="r", candidate="c"), "c (equal name)"),
    (Rule(reference="r", candidate="c", plus="d", transpose=True, source="x"), "c + d transposed (x)"),
    (Rule(reference="r", candidate="c", blocks=(Block(0, 0, 2), Block(1, 0, 2))),
     "c rank 0 columns 0:2, rank 1 columns 0:2 (equal name)"),
])  # fmt: skip
def test_a_rule_in_words(rule: Rule, text: str) -> None:
    assert rule.describe() == text
