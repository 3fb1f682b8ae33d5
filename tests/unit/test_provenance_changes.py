"""What a loader did to numbers on the way is named, in every dtype, and what it did is known how to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paritykit.provenance.changes import FUNCTIONS, UNDO, forward, name_change
from paritykit.provenance.values import compare_values
from paritykit.provenance.weightmap import Landing, Span, WeightMap
from tests.weights import random_tensor, trace_pairs

Change = Callable[[torch.Tensor], torch.Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KNOWN: dict[str, Change] = {
    "": lambda w: w,
    "+1": lambda w: w + 1,
    "-1": lambda w: w - 1,
    "negated": lambda w: -w,
    "*2": lambda w: w * 2,
    "*0.5": lambda w: w * 0.5,
    "*3.5": lambda w: w * 3.5,
    "*-3.5": lambda w: w * -3.5,
    "+0.5": lambda w: w + 0.5,
    "-0.25": lambda w: w - 0.25,
    "*3 + 1": lambda w: w * 3 + 1,
    "*3 + -1": lambda w: w * 3 - 1,
    "-exp(x)": lambda w: -torch.exp(w),
    "exp(x)": torch.exp,
    "log(x)": torch.log,
    "1/x": lambda w: 1 / w,
    "sqrt(x)": torch.sqrt,
    "x^2": lambda w: w * w,
    "sigmoid(x)": torch.sigmoid,
    "tanh(x)": torch.tanh,
    "softplus(x)": torch.nn.functional.softplus,
}


def traced(change: Change, dtype: torch.dtype, *shape: int) -> tuple[WeightMap, torch.Tensor, torch.Tensor]:
    """The map, the tensor and the parameter of a loader that changes ``b`` among others of the same shape."""
    held = {n: torch.zeros(shape, dtype=dtype) for n in "abc"}

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            held[name].copy_(change(tensor) if name == "b" else tensor)

    pairs = [(n, random_tensor(*shape, dtype=dtype, seed=k).abs() + 0.5) for k, n in enumerate("abc")]
    found = trace_pairs(held, pairs, load)
    load(pairs)
    return found, pairs[1][1], held["b"]


def approximately(change: str) -> tuple[str, list[float]]:
    """A change as its kind and its numbers."""
    if change[:1] not in ("*", "+") and not change[1:2].isdecimal():
        return change, []
    factor, _, offset = change[1:].partition(" + ") if change[0] == "*" else ("1", "", change)
    return "straight", [float(factor), float(offset or 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", list(KNOWN))
def test_changes_are_named_and_their_numbers_compared(change: str, dtype: torch.dtype) -> None:
    found, tensor, held = traced(KNOWN[change], dtype, 16, 12)
    landings = found.of_parameter("b")
    assert not found.gaps
    assert {x.tensor for x in landings} == {"b"}
    (name,) = {x.change for x in landings}
    kind, told = approximately(name)
    assert (kind, told) == (approximately(change)[0], pytest.approx(approximately(change)[1], rel=2e-2, abs=2e-2))
    if dtype == torch.float32:
        assert name == change
    assert not sum(a.differing for a in compare_values(found, {"b": held}, [("b", tensor)]) if a.tensor == "b")
    held[3, 4] = held[3, 4] * 2 + 1
    arrived = next(compare_values(found, {"b": held}, [("b", tensor)]))
    assert (arrived.differing, arrived.index) == (1, (3, 4))
    held[3, 4] = torch.nan
    assert next(compare_values(found, {"b": held}, [("b", tensor)])).differing == 1


@pytest.mark.parametrize("change", ["+1", "*2", "negated", "*0.5", "-1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_changes_are_found_in_any_layout(change: str, dtype: torch.dtype) -> None:
    found, _, _ = traced(lambda w: forward(change)(w.flip(0)), dtype, 7, 5)
    (landing,) = found.of_parameter("b")
    assert (landing.change, landing.source[0], landing.target[0]) == (change, Span(6, 7, -1), Span(0, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1])
def test_functions_are_found_on_a_rank_s_slice(rank: int, dtype: torch.dtype) -> None:
    held = {"a": torch.zeros(1, 8, dtype=dtype)}

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "a":
                held["a"].copy_(-tensor[:, rank * 8 : rank * 8 + 8].exp())

    pairs = [("z", torch.zeros(1, 16)), ("a", torch.zeros(1, 16))]
    found = trace_pairs(held, pairs, load, rank)
    assert found.landings == [
        Landing(tensor="a", parameter="a", rank=rank, change="-exp(x)", axes=(-1, 1),
                source=(Span(0, 1), Span(rank * 8, 8)), target=(Span(0, 1), Span(0, 8))),
    ]  # fmt: skip


@given(st.floats(-1e7, 1e7).filter(lambda f: abs(f) > 1e-5), st.sampled_from([torch.float32, torch.bfloat16]))
@example(0.01, torch.bfloat16)
@example(2**0.5, torch.float32)
@example(1e6, torch.float32)
@settings(deadline=None, max_examples=60)
def test_any_factor_is_told_closely_enough_to_compare(factor: float, dtype: torch.dtype) -> None:
    x = 0.25 + 1.5 * torch.rand(64, generator=torch.Generator().manual_seed(0)).to(dtype).double()
    y = (x * factor).to(dtype).double()
    change = name_change(x, y, dtype)
    eps = torch.finfo(dtype).eps
    assert change
    assert ((forward(change)(x) - y).abs() <= 8 * eps * (y.abs() + 1)).all()


def test_what_no_known_change_explains_stays_unknown() -> None:
    found, _, _ = traced(lambda w: torch.sin(9 * w.double()).to(w.dtype), torch.float32, 16, 12)
    assert [g.kind for g in found.gaps] == ["unknown"]
    found, _, _ = traced(lambda w: w.softmax(0), torch.float32, 16, 12)
    assert [g.kind for g in found.gaps] == ["unknown"]


def test_too_few_points_prove_no_line() -> None:
    x = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
    assert name_change(x, x * 3 + 0.1, torch.float32) == ""
    assert name_change(x[:1], x[:1].exp(), torch.float32) == ""
    assert name_change(x, x.exp(), torch.float32) == "exp(x)"
    assert name_change(x.repeat(2), x.repeat(2) * 3 + 0.1, torch.float32) == "*3 + 0.1"
    assert name_change(x.repeat(2), torch.full((6,), 0.7).double(), torch.float32) == ""
    assert name_change(torch.ones(6).double(), torch.full((6,), 0.7).double(), torch.float32) == ""
    assert name_change(x.repeat(2), x.repeat(2) * torch.inf, torch.float32) == ""


@pytest.mark.parametrize("change", [c for c in UNDO if c])
def test_undo_takes_the_change_back(change: str) -> None:
    weights = random_tensor(9, dtype=torch.float64)
    torch.testing.assert_close(UNDO[change](forward(change)(weights)), weights)


def test_forward_knows_every_name() -> None:
    for name, function in KNOWN.items():
        weights = random_tensor(9, dtype=torch.float64).abs() + 0.1
        torch.testing.assert_close(forward(name)(weights), function(weights), msg=name)
    assert set(FUNCTIONS) < set(KNOWN)
    with pytest.raises(KeyError, match="cosh"):
        forward("cosh(x)")
    assert float(forward("*1e+06 + -2e-05")(torch.tensor(1.0, dtype=torch.float64))) == 1e6 - 2e-5
