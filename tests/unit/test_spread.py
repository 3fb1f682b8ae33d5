"""Truth, twin and candidate measured at once: the same numbers as the definitions give, however the rows are fed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.comparison import spread
from paritykit.comparison.noise import LEAST_CHANNEL, LEAST_ROW, Noise, Spread
from paritykit.comparison.spread import SpreadMeter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def noise(*sides: torch.Tensor, cuts: tuple[int, ...] = ()) -> Noise:
    meter = SpreadMeter()
    for parts in zip(*(x.tensor_split(cuts) for x in sides), strict=True):
        meter.update(*parts)
    return meter.result()


def drawn(seed: int, rows: int, features: int, *, error: float = 1e-2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return [truth, *(truth + error * torch.randn(truth.shape, generator=generator) for _ in range(2))]


def defined(truth: torch.Tensor, side: torch.Tensor) -> dict[str, Any]:
    """The definitions, one by one, in float64."""
    t, e = truth.double().numpy(), (side.double() - truth.double()).numpy()
    size = np.linalg.norm(t)
    by_row = (e * t).sum(1, keepdims=True) / (t * t).sum(1, keepdims=True) * t
    by_channel = (e * t).sum(0) / (t * t).sum(0) * t
    offsets = np.broadcast_to(e.mean(0), e.shape)
    sizes, widths = np.linalg.norm(t, axis=1), np.linalg.norm(t, axis=0)
    return {
        "whole": np.linalg.norm(e) / size,
        "scale": (e * t).sum() / (t * t).sum(),
        "row_scale": np.linalg.norm(by_row) / size,
        "channel_scale": np.linalg.norm(by_channel) / size,
        "channel_bias": np.linalg.norm(offsets) / size,
        "sigma": e.std() / math.sqrt((t * t).mean()),
        "row": np.linalg.norm(e, axis=1) / np.maximum(sizes, LEAST_ROW * np.median(sizes)),
        "channel": np.linalg.norm(e, axis=0) / np.maximum(widths, LEAST_CHANNEL * np.median(widths)),
    }


def assert_defined(found: Spread, truth: torch.Tensor, side: torch.Tensor, *, rel: float) -> None:
    for name, value in defined(truth, side).items():
        assert getattr(found, name) == pytest.approx(value, rel=rel, abs=rel * found.whole * 0.1, nan_ok=True), name


@settings(max_examples=40)
@given(
    st.integers(0, 99),
    st.integers(1, 12),
    st.integers(1, 40),
    st.tuples(*[st.sampled_from(DTYPES)] * 3),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_the_numbers_are_as_defined(
    seed: int, rows: int, features: int, dtypes: tuple[torch.dtype, ...], cuts: list[int]
) -> None:
    sides = [x.to(d) for x, d in zip(drawn(seed, rows, features), dtypes, strict=True)]
    found = noise(*sides, cuts=tuple(sorted(min(c, rows) for c in cuts)))
    assert (found.rows, found.features) == (rows, features)
    assert 1 <= found.even_rows <= rows * (1 + 1e-9)
    assert_defined(found.twin, sides[0], sides[1], rel=2e-3)
    assert_defined(found.candidate, sides[0], sides[2], rel=2e-3)
    energies = [sides[0].double() ** 2, (sides[1].double() - sides[0].double()) ** 2]
    for axis, value in ((1, found.even_rows), (0, found.even_channels)):
        even = [float(q.sum() ** 2 / (q.sum(axis) ** 2).sum()) for q in energies]
        assert value == pytest.approx(min(v for v in even if not math.isnan(v)), rel=2e-3)


@pytest.mark.parametrize("shape", [(3, 50), (64, 7)])
def test_tiles_make_no_difference(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows wider than a tile are measured in stretches, tall ones in several tiles."""
    sides = drawn(0, *shape)
    whole = noise(*sides)
    monkeypatch.setattr(spread, "STRETCH", 16)
    tiled = noise(*sides)
    for ours, theirs in ((whole.twin, tiled.twin), (whole.candidate, tiled.candidate)):
        for name in Spread.__struct_fields__:
            assert getattr(theirs, name) == pytest.approx(getattr(ours, name), rel=1e-9), name


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 1e25])
def test_sizes_whose_squares_are_no_float32(size: float) -> None:
    sides = [(x * size).float() for x in drawn(1, 5, 8)]
    found, plain = noise(*sides), noise(*drawn(1, 5, 8))
    assert found.candidate.whole == pytest.approx(plain.candidate.whole, rel=1e-4)
    assert found.candidate.scale == pytest.approx(plain.candidate.scale, rel=1e-2)
    assert list(found.twin.row) == pytest.approx(list(plain.twin.row), rel=1e-4)


def test_what_is_not_finite_is_left_out() -> None:
    sides = drawn(2, 6, 8)
    holed = [x.clone() for x in sides]
    holed[0][1, 2] = holed[1][1, 2] = holed[2][1, 2] = -math.inf
    holed[2][4, 4] = math.nan
    for x in sides:
        x[1, 2] = x[4, 4] = 0.0
    found, plain = noise(*holed), noise(*sides)
    assert found.candidate.whole == pytest.approx(plain.candidate.whole)
    assert found.twin.whole == pytest.approx(plain.twin.whole)
    assert list(found.candidate.row) == pytest.approx(list(plain.candidate.row))


def test_a_truth_of_zeros() -> None:
    zeros = torch.zeros(4, 3)
    none = noise(zeros, zeros, zeros)
    assert (none.candidate.whole, none.ratio, none.overlap) == (0.0, 1.0, 1.0)
    some = noise(zeros, zeros, torch.eye(4, 3))
    assert (some.candidate.whole, some.ratio) == (pytest.approx(math.sqrt(3)), math.inf)
    assert list(some.candidate.row) == [1.0] * 3 + [0.0]


def test_a_row_near_zero_does_not_explode() -> None:
    truth, twin, candidate = drawn(3, 9, 16)
    near = truth.clone()
    near[4] *= 1e-9
    found = noise(near, near + (twin - truth), near + (candidate - truth))
    assert found.candidate.row[4] < 20 * max(v for n, v in enumerate(found.candidate.row) if n != 4)


def test_ratios_and_overlap() -> None:
    truth, twin, _ = drawn(4, 200, 16)
    same, thrice = noise(truth, twin, 2 * truth - twin), noise(truth, twin, truth + 3 * (truth - twin))
    assert (same.ratio, same.typical_ratio) == (pytest.approx(1), pytest.approx(1))
    assert same.overlap > 0.98
    assert [thrice.ratio, thrice.typical_ratio, thrice.sigma_ratio] == pytest.approx([3, 3, 3])
    assert thrice.overlap < 0.05
    shifted = noise(truth, twin, twin + 0.05)
    assert shifted.ratio > 3
    assert shifted.sigma_ratio == pytest.approx(1)
    assert set(shifted.as_dict()) == {"floor_ratio", "sigma_ratio", "typical_ratio", "overlap"}


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3), (2, 4)), ((2, 3), (3, 3), (2, 3)), ((6,), (6,), (6,))], ids=str)
def test_shapes_that_differ(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[rows, features\] of one shape"):
        SpreadMeter().update(*(torch.zeros(s) for s in shapes))


def test_nothing_to_measure() -> None:
    meter = SpreadMeter()
    meter.update(*(torch.zeros(0, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="nothing was measured"):
        meter.result()
