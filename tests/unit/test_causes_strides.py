"""Rotation that steps through memory: at the distance of tokens it is the right one, at that of heads it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.diagnose.bench.form import Place
from paritykit.diagnose.bench.rotation import Rotation, powers
from paritykit.diagnose.causes.strides import _turn_along
from tests.scenes import numbers

DIMS = 8


def turned(interleaved: bool, order: torch.Tensor | None = None) -> Any:
    own = Rotation(DIMS, powers(100.0, DIMS), interleaved)
    return SimpleNamespace(rotation=own, form=SimpleNamespace(order=order))


@given(tokens=st.integers(1, 9), step=st.sampled_from([DIMS, 3 * DIMS]))
def test_pairs_that_are_turned_as_halves_lie_side_by_side_in_memory(tokens: int, step: int) -> None:
    plain, memory = torch.arange(DIMS), numbers(tokens, 3 * DIMS)
    places, right = list(range(tokens)), memory.clone()
    _turn_along(turned(interleaved=True), right.view(-1), 0, step, places)
    _turn_along(turned(interleaved=False, order=torch.cat((plain[::2], plain[1::2]))), memory.view(-1), 0, step, places)
    assert torch.allclose(memory, right, atol=1e-6)


@given(
    tokens=st.integers(1, 9), heads=st.integers(1, 3), before=st.integers(0, 5), interleaved=st.booleans(), at=st.data()
)
def test_at_the_distance_of_tokens_one_head_of_each_is_turned(
    tokens: int, heads: int, before: int, interleaved: bool, at: st.DataObject
) -> None:
    memory = numbers(tokens, before + heads * DIMS)
    head = at.draw(st.integers(0, heads - 1))
    first = Place("q", before, DIMS).starts(heads)[head]
    right = memory.clone()
    own = turned(interleaved)
    part = right[:, None, first : first + DIMS]
    right[:, first : first + DIMS] = own.rotation.turn(part, torch.arange(tokens))[:, 0]
    _turn_along(own, memory.view(-1), first, memory.shape[1], list(range(tokens)))
    assert torch.allclose(memory, right, atol=1e-6)


def test_at_the_distance_of_heads_those_of_the_first_tokens_are_turned_in_turn() -> None:
    memory, own = numbers(6, 3 * DIMS), turned(interleaved=False)
    right = memory.clone().view(-1, 1, DIMS)
    right[:6] = own.rotation.turn(right[:6], torch.arange(6))
    _turn_along(own, memory.view(-1), 0, DIMS, list(range(6)))
    assert torch.allclose(memory.view(-1, 1, DIMS), right, atol=1e-6)
    assert torch.equal(memory[2:], numbers(6, 3 * DIMS)[2:])


def test_what_is_shared_begins_at_one_place_for_all_heads() -> None:
    assert Place("k", 5, DIMS, shared=True).starts(3) == [5, 5, 5]


def test_what_would_lie_beyond_the_end_is_left_alone() -> None:
    memory, own = numbers(2, DIMS), turned(interleaved=True)
    _turn_along(own, memory.view(-1), DIMS, DIMS, [1, 1])
    assert torch.equal(memory[0], numbers(2, DIMS)[0])
