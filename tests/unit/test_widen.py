"""Widening: whatever Python asks torch for in few bits comes back in float64, exact; everything else as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paritykit.engines.widen import NarrowOps, is_narrow, widened

NARROW = (torch.float32, torch.float16, torch.bfloat16)
THIRD = torch.tensor([1 / 3, -2 / 7, 5e-9], dtype=torch.float64)
SEVENTHS = [n / 7 for n in range(8)]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
Cast = Callable[[torch.Tensor, torch.dtype], torch.Tensor]

CASTS: dict[str, Cast] = {
    "to": lambda x, d: x.to(d),
    "to, by name": lambda x, d: x.to(dtype=d),
    "to, on a device": lambda x, d: x.to("cpu", d, copy=True),
    "type": lambda x, d: x.type(d),
    "type, by name": lambda x, d: x.type(dtype=d),
    "type as": lambda x, d: x.type_as(torch.zeros(1, dtype=d)),
    "float": lambda x, d: x.float(),
    "half": lambda x, d: x.half(),
    "bfloat16": lambda x, d: x.bfloat16(),
    "an old type": lambda x, d: x.type(torch.FloatTensor),  # type: ignore[call-overload]
    "an old type's name": lambda x, d: x.type("torch.HalfTensor"),
    "from a list": lambda x, d: torch.tensor(x.tolist(), dtype=d),
    "from a list, as array": lambda x, d: torch.asarray(x.tolist(), dtype=d),
    "like a tensor": lambda x, d: torch.zeros(1, dtype=d).new_tensor(x.tolist()),
    "filled in": lambda x, d: torch.zeros(3, dtype=d).copy_(x),
    "filled in, alike": lambda x, d: torch.empty_like(x, dtype=d).copy_(x),
    "through a module": lambda x, d: nn.Identity().to(d)(x).to(d),
    "summed": lambda x, d: x.reshape(3, 1).sum(1, dtype=d),
}
COMPUTED: dict[str, Callable[[torch.dtype], tuple[torch.Tensor, list[float]]]] = {
    "softmax": lambda d: (F.softmax(THIRD, dim=-1, dtype=d), [math.exp(v) for v in THIRD.tolist()]),
    "softmax of a tensor": lambda d: (THIRD.softmax(-1, dtype=d), [math.exp(v) for v in THIRD.tolist()]),
    "arange": lambda d: (torch.arange(8, dtype=d) / 7, SEVENTHS),
    "linspace": lambda d: (torch.linspace(0, 1, 8, dtype=d), SEVENTHS),
    "a full tensor": lambda d: (torch.full((2,), 1 / 3, dtype=d), [1 / 3] * 2),
    "integers divided": lambda d: (torch.arange(8) / 7, SEVENTHS),
    "a number": lambda d: (torch.tensor(1 / 3), [1 / 3]),
    "ones": lambda d: (torch.ones(2, dtype=d) / 3, [1 / 3] * 2),
}


@narrow
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_to_few_bits_keeps_every_bit(name: str, dtype: torch.dtype) -> None:
    with widened():
        cast = CASTS[name](THIRD, dtype)
    assert cast.dtype == torch.float64
    assert torch.equal(cast, THIRD)
    assert not torch.equal(CASTS[name](THIRD, dtype).double(), THIRD), "without it the same code rounds"


@narrow
@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_in_few_bits_is_computed_in_many(name: str, dtype: torch.dtype) -> None:
    with widened():
        result, expected = COMPUTED[name](dtype)
    wanted = torch.tensor(expected, dtype=torch.float64)
    if "softmax" in name:
        wanted /= wanted.sum()
    torch.testing.assert_close(result.reshape(wanted.shape), wanted, rtol=4e-16, atol=0)


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=9))
def test_any_number_survives_any_cast(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    with widened():
        for cast in ("to", "float", "half", "type", "from a list"):
            assert torch.equal(CASTS[cast](exact, torch.float16), exact)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32], ids=str)
def test_complex_numbers_are_widened_too(dtype: torch.dtype) -> None:
    pairs = torch.tensor([[1 / 3, 2 / 7]], dtype=torch.float64)
    with widened():
        turned = torch.view_as_real(torch.view_as_complex(pairs.float()).to(dtype))
        assert pairs.type(torch.complex64).dtype == torch.complex128
    assert torch.equal(turned, pairs)


def test_autocast_does_not_narrow() -> None:
    linear = nn.Linear(3, 3, dtype=torch.float64)
    with widened(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(THIRD).dtype == torch.float64
    with widened(), torch.autocast("cpu", enabled=False):
        assert torch.equal(THIRD.float(), THIRD)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_all_else_keeps_its_dtype(dtype: torch.dtype) -> None:
    with widened():
        assert torch.zeros(3, dtype=dtype).dtype == dtype
        assert THIRD.to(dtype).dtype == dtype
        assert torch.arange(3).dtype == torch.int64
        assert (THIRD > 0).dtype == torch.bool


@narrow
def test_bytes_are_read_as_what_they_are(dtype: torch.dtype) -> None:
    stored = THIRD.to(dtype)
    data = stored.view(torch.uint8)
    with widened():
        assert torch.equal(data.view(dtype), stored)
        assert torch.equal(data.view(dtype=dtype), stored)
        assert torch.equal(torch.frombuffer(bytearray(data.tolist()), dtype=dtype), stored)


def test_a_masked_row_stays_finite() -> None:
    """The lowest number of a dtype marks what is masked; a row of nothing else is an average, as in float32."""
    for lowest in (torch.finfo(torch.float64).min, torch.finfo(torch.float32).min):
        with widened():
            mask = torch.where(torch.tensor([[False, True], [False, False]]), torch.tensor(0.0), lowest)
            shares = F.softmax(torch.full((2, 2), -3.0, dtype=torch.float32) + mask, dim=-1, dtype=torch.float32)
        assert shares.tolist() == [[0.0, 1.0], [0.5, 0.5]]


def test_it_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), widened():
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32
    assert THIRD.float().dtype == torch.zeros(1).dtype == torch.float32


def test_it_nests() -> None:
    with widened():
        with widened():
            assert THIRD.float().dtype == torch.float64
        assert THIRD.float().dtype == torch.zeros(1).dtype == torch.float64


def test_narrow_operations_are_seen_with_their_place() -> None:
    with NarrowOps() as ops:
        _ = THIRD + 1
    assert not ops.found
    with NarrowOps() as ops:
        _ = THIRD.float().double()
    assert set(ops.found) == {"aten._to_copy.default"}
    assert ops.found["aten._to_copy.default"].startswith("test_widen.py:")


def test_what_widening_does_not_reach_is_seen() -> None:
    """The reason why a truth is proven and not only widened: numpy, old constructors, code without Python."""
    scripted = torch.jit.CompilationUnit("def lower(x):\n    return x.float() * 2.0\n").lower
    for unreached in (
        lambda: scripted(THIRD),
        lambda: torch.FloatTensor([1 / 3]) + THIRD,
        lambda: torch.from_numpy(np.ones(3, dtype=np.float32)) * THIRD,
    ):
        with widened(), NarrowOps() as ops:
            unreached()
        assert ops.found


@pytest.mark.parametrize("dtype", [*NARROW, torch.float8_e5m2, torch.complex64], ids=str)
def test_narrow_means_fewer_bits_than_float64(dtype: torch.dtype) -> None:
    assert is_narrow(torch.zeros(1, dtype=dtype))
    assert not any(
        is_narrow(x) for x in (THIRD, torch.zeros(1, dtype=torch.int8), THIRD.to(torch.complex128), 1.0, None)
    )
