"""The measuring core against plain float64 numpy, at its edges, and by its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paritykit.comparison import metrics
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.metrics import Meter, measure

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SUMS = ["rel_l2", "rel_max", "norm_ratio", "max_abs", "mean_abs", "max_ulp"]


def doubles(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def spacing(magnitude: np.ndarray, *dtypes: torch.dtype) -> np.ndarray:
    """Distance to the next larger number of the coarsest floating dtype, from its mantissa bits alone."""
    floating = [d for d in dtypes if d.is_floating_point]
    if not floating:
        return np.ones_like(magnitude)
    info = max((torch.finfo(d) for d in floating), key=lambda i: i.eps)
    _, exponent = np.frexp(np.maximum(magnitude, info.smallest_normal))
    return np.ldexp(info.eps, exponent - 1)


def oracle(reference: torch.Tensor, candidate: torch.Tensor, tolerance: float = metrics.ELEMENT_TOLERANCE) -> dict:
    r, c = doubles(reference), doubles(candidate)
    d = np.abs(c - r)
    rows = np.linalg.norm(r, axis=1)
    floor = np.sqrt(np.mean(r**2, axis=1, keepdims=True))
    return {
        "rel_l2": np.linalg.norm(d) / np.linalg.norm(r),
        "rel_max": d.max() / np.abs(r).max(),
        "norm_ratio": np.linalg.norm(c) / np.linalg.norm(r),
        "cosine": (r * c).sum() / (np.linalg.norm(r) * np.linalg.norm(c)),
        "mean_error": (c - r).mean(),
        "mean_abs": d.mean(),
        "max_abs": d.max(),
        "fraction_beyond": np.mean(d > tolerance * np.maximum(np.abs(r), floor)),
        "max_ulp": (d / spacing(np.maximum(np.abs(r), np.abs(c)), reference.dtype, candidate.dtype)).max(),
        "row_rel_l2": np.linalg.norm(d, axis=1) / np.maximum(rows, 0.1 * np.sqrt(np.mean(rows**2))),
    }


def check(reference: torch.Tensor, candidate: torch.Tensor, got: Measurement, rel: float = 1e-5) -> None:
    want = oracle(reference, candidate)
    assert {n: getattr(got, n) for n in SUMS} == pytest.approx({n: want[n] for n in SUMS}, rel=rel)
    assert got.cosine == pytest.approx(want["cosine"], abs=1e-6)
    assert got.mean_error == pytest.approx(want["mean_error"], abs=max(1e-6 * want["mean_abs"], 1e-300))
    assert list(got.row_rel_l2) == pytest.approx(want["row_rel_l2"].tolist(), rel=rel)
    few, many = (
        oracle(reference, candidate, metrics.ELEMENT_TOLERANCE * f)["fraction_beyond"] for f in (1.00001, 0.99999)
    )
    assert few <= got.fraction_beyond <= many
    if not got.max_abs:
        return
    at = (got.max_abs_row, got.max_abs_column)
    assert got.max_abs_reference == doubles(reference)[at]
    assert got.max_abs_candidate == doubles(candidate)[at]
    assert abs(got.max_abs_candidate - got.max_abs_reference) == pytest.approx(got.max_abs, rel=1e-6)


def draw(seed: int, rows: int, features: int, noise: float = 1e-2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    reference *= torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 3
    return reference, reference + noise * torch.randn(rows, features, generator=generator, dtype=torch.float64)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(metrics, "STRETCH", 64)
    return 64


sizes = st.tuples(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 70))


@given(sizes, st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.sampled_from([1e-3, 1e-1, 3.0]))
@settings(max_examples=150, deadline=None)
def test_agrees_with_float64(size, first, second, noise):
    reference, candidate = draw(*size, noise)
    reference, candidate = (reference + 0.5).to(first), candidate.to(second)
    assume(doubles(reference).any() and doubles(candidate).any())
    check(reference, candidate, measure(reference, candidate))


@given(sizes, st.sampled_from(INTEGERS), st.sampled_from([*INTEGERS, torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_integers_agree_with_float64(size, first, second):
    reference, candidate = draw(*size, 1.0)
    reference, candidate = (reference * 9).abs().add(1).to(first), (candidate * 9).abs().add(1).to(second)
    check(reference, candidate, measure(reference, candidate))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from(FLOATS[:4]), st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_spans_add_up_to_their_concatenation(lengths, dtype, seed):
    reference, candidate = draw(seed, sum(lengths) + 1, 37)
    reference, candidate = reference.to(dtype), candidate.to(dtype)
    reference[0, 3] = math.nan
    meter = Meter()
    for r, c in zip(reference.split([1, *lengths]), candidate.split([1, *lengths]), strict=True):
        meter.update(r, c)
    split, whole = meter.result(), measure(reference, candidate)
    assert split.as_dict() == pytest.approx(whole.as_dict(), rel=1e-6, abs=1e-9)
    assert list(split.row_rel_l2) == pytest.approx(list(whole.row_rel_l2), rel=1e-6)


@pytest.mark.parametrize("features", [1, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_tiles(small_tiles, features, dtype):
    reference, candidate = (x.to(dtype) for x in draw(features, 23, features, 1e-3))
    got, want = measure(reference, candidate), oracle(reference, candidate)
    assert {n: getattr(got, n) for n in SUMS} == pytest.approx({n: want[n] for n in SUMS}, rel=1e-5)
    assert list(got.row_rel_l2) == pytest.approx(want["row_rel_l2"].tolist(), rel=1e-5)
    assert doubles(candidate)[got.max_abs_row, got.max_abs_column] == got.max_abs_candidate


def test_wide_row_takes_its_floor_from_the_stretch(small_tiles):
    reference = torch.cat([torch.ones(1, small_tiles), torch.full((1, small_tiles), 100.0)], dim=1)
    candidate = reference + 0.5
    assert measure(reference, candidate, element_tolerance=0.05).fraction_beyond == 0.5


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.7])
@pytest.mark.parametrize("shape", [(2500, 4000), (1, 10_000_000)])
def test_ten_million_equal_values_lose_nothing(value, shape):
    reference = torch.full(shape, value)
    candidate = reference + 1e-6
    got, error = measure(reference, candidate), float(candidate[0, 0].double() - reference[0, 0].double())
    exact = float(reference[0, 0].double())
    assert got.rel_l2 == pytest.approx(error / exact, rel=1e-5)
    assert got.norm_ratio == pytest.approx((error + exact) / exact, rel=1e-6)
    assert got.mean_abs == pytest.approx(error, rel=1e-5)
    assert got.mean_error == pytest.approx(error, rel=1e-5)
    assert got.cosine == pytest.approx(1, abs=1e-6)


def test_ten_million_random_values():
    reference, candidate = (x.float() for x in draw(5, 2500, 4000, 1e-6))
    check(reference, candidate, measure(reference, candidate))


@pytest.mark.parametrize("dtype", FLOATS)
def test_identity_is_perfect(dtype):
    reference = draw(1, 5, 40)[0].to(dtype)
    got = measure(reference, reference.clone())
    assert (got.max_abs, got.rel_l2, got.rel_max, got.mean_error, got.mean_abs) == (0, 0, 0, 0, 0)
    assert (got.fraction_beyond, got.max_ulp, set(got.row_rel_l2)) == (0, 0, {0.0})
    assert (got.cosine, got.norm_ratio) == (pytest.approx(1, abs=1e-6), pytest.approx(1))
    assert (got.rows, got.count) == (5, 200)


@given(st.floats(-8, 8).filter(lambda s: abs(s) > 1e-2), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_scaling_keeps_the_direction(scale, seed):
    reference = draw(seed, 4, 30)[0].float()
    got = measure(reference, reference * scale)
    assert got.cosine == pytest.approx(math.copysign(1, scale), abs=1e-6)
    assert got.norm_ratio == pytest.approx(abs(scale), rel=1e-6)
    assert got.rel_l2 == pytest.approx(abs(scale - 1), rel=1e-5, abs=1e-6)


def test_opposite_and_orthogonal():
    reference = torch.tensor([[1.0, 0.0]])
    assert measure(reference, -reference).cosine == -1
    assert measure(reference, reference.flip(1)).cosine == 0


def test_one_zero_side():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    lost, made = measure(one, zero), measure(zero, one)
    assert (lost.rel_l2, lost.norm_ratio, lost.cosine, list(lost.row_rel_l2)) == (1, 0, 0, [1, 1])
    assert (made.rel_l2, made.rel_max, made.norm_ratio, made.cosine) == (math.inf, math.inf, math.inf, 0)
    assert list(made.row_rel_l2) == pytest.approx([1, 1])
    assert (lost.fraction_beyond, made.fraction_beyond) == (1, 1)


def test_both_zero_of_either_sign():
    got = measure(torch.zeros(2, 3), -torch.zeros(2, 3))
    assert (got.rel_l2, got.rel_max, got.cosine, got.norm_ratio, got.max_ulp) == (0, 0, 1, 1, 0)
    assert list(got.row_rel_l2) == [0, 0]


def test_row_near_zero_does_not_explode():
    reference = torch.ones(4, 16)
    reference[2] = 1e-12
    candidate = reference.clone()
    candidate[2] += 1e-3
    got = measure(reference, candidate)
    assert got.row_rel_l2[2] == pytest.approx(1e-3 / (0.1 * math.sqrt(3 / 4)), rel=1e-5)
    assert [got.row_rel_l2[i] for i in (0, 1, 3)] == [0, 0, 0]


def test_element_near_zero_is_held_to_the_scale_of_its_row():
    reference = torch.tensor([[1.0, -1.0, 1.0, 1e-6]])
    assert measure(reference, reference + 0.01, element_tolerance=0.02).fraction_beyond == 0
    assert measure(reference, reference + 0.01, element_tolerance=0.005).fraction_beyond == 1


def test_huge_row_does_not_hide_a_small_one():
    reference = torch.ones(2, 8)
    reference[0] = 1e6
    candidate = reference.clone()
    candidate[1] += 0.5
    assert measure(reference, candidate).fraction_beyond == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 1.5, 3.14, 1000.0, 0.0, 1e-5])
def test_neighbours_are_one_ulp_apart(dtype, value):
    reference = torch.full((1, 1), value, dtype=dtype)
    above = torch.nextafter(reference, torch.full_like(reference, math.inf))
    assert measure(reference, above).max_ulp == 1
    assert measure(-above, -reference).max_ulp == 1


def test_spacing_is_that_of_the_larger_side():
    assert measure(torch.ones(1, 1), torch.full((1, 1), 1 - 2**-24)).max_ulp == 0.5


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals_lie_on_an_even_grid(dtype):
    info = torch.finfo(dtype)
    step = info.smallest_normal * info.eps
    reference = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64).mul(step).to(dtype)
    candidate = torch.tensor([[3.0, 2.0, -1.0]], dtype=torch.float64).mul(step).to(dtype)
    assert measure(reference, candidate).max_ulp == 2


def test_ulp_counts_in_the_coarser_dtype():
    reference = torch.tensor([[1.0 + 2**-10]])
    assert measure(reference, torch.ones(1, 1, dtype=torch.bfloat16)).max_ulp == 2**-3
    assert measure(reference, torch.ones(1, 1)).max_ulp == 2**13


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-22, 1e19, 1e30, 3e38])
def test_extreme_magnitudes_neither_underflow_nor_overflow(scale):
    reference, candidate = draw(3, 4, 9, 1e-1)
    reference, candidate = ((x / 9.1 * scale).float() for x in (reference, candidate))
    check(reference, candidate, measure(reference, candidate))


def test_tiny_error_beside_large_values_is_measured():
    reference = torch.ones(2, 4)
    reference[1, 1] = 1e-24
    candidate = reference.clone()
    candidate[1, 1] = 3e-24
    assert measure(reference, candidate).rel_l2 == pytest.approx(2e-24 / math.sqrt(7), rel=1e-5)
    candidate = torch.full((2, 4), 1e-25)
    assert measure(torch.ones(2, 4), candidate).norm_ratio == pytest.approx(1e-25, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_is_counted_and_left_out(dtype):
    reference, candidate = (x.to(dtype) for x in draw(7, 4, 6))
    clean = measure(reference[1:], candidate[1:])
    inf, nan = math.inf, math.nan
    reference[0] = torch.tensor([nan, inf, -inf, inf, 1.0, nan], dtype=dtype)
    candidate[0] = torch.tensor([nan, inf, -inf, -inf, nan, inf], dtype=dtype)
    got = measure(reference, candidate)
    assert (got.nonfinite_reference, got.nonfinite_candidate, got.nonfinite_mismatch) == (5, 6, 3)
    assert got.row_rel_l2[0] == inf
    assert all(map(math.isfinite, got.row_rel_l2[1:]))
    for name in [*SUMS, "cosine", "mean_error", "fraction_beyond"]:
        assert getattr(got, name) == pytest.approx(getattr(clean, name), rel=1e-5, abs=1e-7), name
    assert (got.count, got.max_abs_row) == (24, clean.max_abs_row + 1)


def test_equal_nonfinite_is_no_mismatch():
    reference = torch.tensor([[-math.inf, 1.0, math.nan, 2.0]])
    got = measure(reference, reference.clone())
    assert (got.nonfinite_reference, got.nonfinite_candidate, got.nonfinite_mismatch) == (2, 2, 0)
    assert (got.rel_l2, list(got.row_rel_l2), got.norm_ratio) == (0, [0], 1)


def test_masked_elements_do_not_lower_the_floor_of_their_row():
    reference = torch.tensor([[1.0, 1.0, 1e-6, *[-math.inf] * 997]])
    candidate = reference + torch.tensor([[0.0, 0.0, 0.03, *[0.0] * 997]])
    assert measure(reference, candidate, element_tolerance=0.05).fraction_beyond == 0


def test_all_nonfinite_still_reports_the_mismatch():
    got = measure(torch.full((1, 3), math.nan), torch.ones(1, 3))
    assert (got.nonfinite_mismatch, got.max_abs, list(got.row_rel_l2)) == (3, 0, [math.inf])
    assert all(math.isfinite(v) for v in got.as_dict().values())


def test_measuring_leaves_the_inputs_alone():
    reference, candidate = draw(2, 3, 8)
    reference[0, 0] = math.nan
    copies = reference.clone(), candidate.clone()
    measure(reference, candidate)
    torch.testing.assert_close((reference, candidate), copies, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype):
    wide, other = (x.to(dtype) for x in draw(4, 12, 64))
    for cut in (lambda t: t[:, 16:48], lambda t: t[::2], lambda t: t.T, lambda t: t[:1].expand(5, -1)):
        got = measure(cut(wide), cut(other))
        assert got == measure(cut(wide).contiguous(), cut(other).contiguous())


def test_parameters_and_gradients_do_not_matter():
    reference = torch.nn.Parameter(torch.ones(2, 3))
    assert measure(reference, (reference * 2)).norm_ratio == 2
    with torch.inference_mode():
        meter = Meter()
        meter.update(torch.ones(1, 2), torch.ones(1, 2))
    meter.update(torch.ones(1, 2), torch.zeros(1, 2))
    assert meter.result().rel_l2 == pytest.approx(math.sqrt(0.5))


def test_dtypes_may_change_between_spans():
    meter = Meter()
    meter.update(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bfloat16))
    meter.update(torch.ones(2, 9, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.int8))
    got = meter.result()
    assert (got.rows, got.count, got.max_abs, got.max_abs_row) == (3, 22, 1, 1)
    assert got.mean_error == pytest.approx(-18 / 22)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_only_rows_and_features(shape):
    with pytest.raises(ValueError, match=r"\[rows, features\]"):
        measure(torch.zeros(shape), torch.zeros(shape))


def test_refuses_what_has_no_metrics():
    with pytest.raises(ValueError, match="one shape"):
        measure(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="one device"):
        measure(torch.zeros(2, 3), torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match="only real dtypes"):
        measure(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.complex64))


def test_nothing_measured_is_an_error():
    meter = Meter()
    with pytest.raises(ValueError, match="nothing was measured"):
        meter.result()
    meter.update(torch.zeros(5, 0), torch.zeros(5, 0))
    meter.update(torch.zeros(0, 7), torch.zeros(0, 7))
    with pytest.raises(ValueError, match="nothing was measured"):
        meter.result()
    meter.update(torch.ones(1, 7), torch.ones(1, 7))
    assert list(meter.result().row_rel_l2) == [0] * 6


def test_as_dict_holds_every_scalar():
    got = measure(*draw(1, 2, 3))
    assert set(got.as_dict()) == set(Measurement.__struct_fields__) - {"row_rel_l2"}
    assert got.as_dict()["rel_l2"] == got.rel_l2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_lanes_change_nothing_and_leave_torch_as_it_was(small_tiles, threads):
    reference, candidate = (x.float() for x in draw(8, 40, 30))
    reference[35, 2] = math.nan
    candidate[33, 7] += 50
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = measure(reference, candidate)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (got.max_abs_row, got.max_abs_column) == (33, 7)
    assert [i for i, v in enumerate(got.row_rel_l2) if math.isinf(v)] == [35]
    reference[35, 2] = candidate[35, 2] = 0
    check(reference, candidate, measure(reference, candidate))


def test_first_of_equal_errors_wins(small_tiles):
    reference = torch.zeros(9, 40)
    reference[[2, 7], [5, 1]] = 1.0
    got = measure(reference, torch.zeros(9, 40))
    assert (got.max_abs_row, got.max_abs_column, got.max_abs_reference) == (2, 5, 1)
