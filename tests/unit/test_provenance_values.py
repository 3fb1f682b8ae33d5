"""Whether real numbers arrived: quiet for every layout, and any one that differs is found with its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.provenance import values
from paritykit.provenance.values import compare_values
from paritykit.provenance.weightmap import Arrived, WeightMap, size
from tests.weights import random_tensor, trace_pairs

SHAPES = {"a": (6, 4), "b": (12,), "c": (3, 5, 4), "d": ()}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.permute(*reversed(range(t.dim()))) if t.dim() else t,
    "reversed": lambda t: t.flip(tuple(range(t.dim()))),
    "rolled": lambda t: t.roll(1, 0) if t.dim() else t,
    "unsqueezed": lambda t: t.unsqueeze(0),
    "regrouped": lambda t: t.reshape(3, -1, *t.shape[1:]).transpose(0, 1).reshape(t.shape) if t.dim() else t,
}


def held_as(layout: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[WeightMap, dict]:
    """The map, and parameters with the real tensors in them."""
    held = {n: LAYOUTS[layout](t).to(dtype, copy=True).contiguous() for n, t in tensors.items()}

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            held[name].copy_(LAYOUTS[layout](tensor))

    return trace_pairs(held, list(tensors.items()), load), held


def checkpoint() -> dict[str, torch.Tensor]:
    return {n: random_tensor(*s, seed=k) for k, (n, s) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_clean_is_quiet(monkeypatch: pytest.MonkeyPatch, layout: str, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(values, "CHUNK", chunk)
    tensors = checkpoint()
    found, held = held_as(layout, tensors, dtype)
    arrived = list(compare_values(found, held, tensors.items()))
    assert len(arrived) == len(found.landings)
    assert sum(a.elements for a in arrived) == sum(t.numel() for t in tensors.values())
    assert {(a.differing, a.largest, a.index, a.expected) for a in arrived} == {(0, 0.0, (), None)}


@given(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(SHAPES)), st.sampled_from([1, 3, 1000]), st.data())
@settings(deadline=None, max_examples=120)
def test_one_changed_element_is_found_with_its_place(layout: str, name: str, chunk: int, data: st.DataObject) -> None:
    tensors, before = checkpoint(), values.CHUNK
    found, held = held_as(layout, tensors, torch.float32)
    index = tuple(data.draw(st.integers(0, n - 1)) for n in SHAPES[name])
    expected = float(tensors[name][index])
    tensors[name][index] = expected + 2
    values.CHUNK = chunk
    try:
        (wrong,) = [a for a in compare_values(found, held, tensors.items()) if a.differing]
    finally:
        values.CHUNK = before
    assert (wrong.tensor, wrong.differing, wrong.index) == (name, 1, index)
    assert (wrong.largest, wrong.expected, wrong.found) == pytest.approx((2, expected + 2, expected))


def differing(expected: list[float], found: list[float], dtype: torch.dtype = torch.float32) -> Arrived:
    tensors = {"a": torch.zeros(len(expected))}
    known, held = held_as("as it is", tensors, dtype)
    held["a"].copy_(torch.tensor(found))
    (arrived,) = compare_values(known, held, [("a", torch.tensor(expected))])
    return arrived


def test_numbers_that_are_none() -> None:
    inf, nan = math.inf, math.nan
    assert differing([nan, inf, -inf, 0.0], [nan, inf, -inf, -0.0]).differing == 0
    one = differing([nan, 1.0, inf, 2.0], [1.0, nan, -inf, 2.0])
    assert (one.differing, one.largest, one.index) == (3, inf, (0,))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_largest_and_the_first_are_told(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(values, "CHUNK", chunk)
    one = differing([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 3.0, 1.0])
    assert (one.differing, one.largest, one.index, one.expected, one.found) == (2, 3.0, (1,), 2.0, 2.5)


def test_the_cast_is_what_is_expected() -> None:
    exact = [1 + 2**-12, 3.3, 1e-6]
    assert differing(exact, exact, torch.bfloat16).differing == 0
    assert differing(exact, [1.0, 3.3, 1e-6], torch.float32).differing == 1
    assert differing([3.3, 1.0], [3.3, 1 + 2**-7], torch.bfloat16).differing == 1
    assert differing([1e9, 1.0], [1e9, 1.0], torch.float16).differing == 0


def test_each_copy_is_compared_with_its_own_landing() -> None:
    held = {"a": torch.zeros(2)}
    zero, one = torch.zeros(2), torch.ones(2)

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            held["a"].copy_(tensor)

    found = trace_pairs(held, [("a", zero), ("a", one)], load)
    assert [a.differing for a in compare_values(found, held, [("a", one), ("a", zero)])] == [0]
    assert [a.differing for a in compare_values(found, held, [("a", zero), ("a", one)])] == [2]


def test_progress_is_told_and_unread_tensors_are_skipped() -> None:
    tensors, told = checkpoint(), list[str]()
    found, held = held_as("as it is", tensors, torch.float32)
    list(compare_values(found, held, [*tensors.items(), ("other", torch.zeros(3))], progress=told.append))
    assert told == list(SHAPES)


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "CHUNK", 10)
    found, _ = held_as("transposed", {"a": torch.zeros(6, 4)}, torch.float32)
    parts = list(values._chunks(found.landings[0]))
    assert [p.source[0].count for p in parts] == [2, 2, 2]
    assert [p.target[1].start for p in parts] == [0, 2, 4]
    monkeypatch.setattr(values, "CHUNK", 1)
    assert max(size(p.source) for p in values._chunks(found.landings[0])) == 4
