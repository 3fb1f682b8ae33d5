"""The floor's judge: equal noise passes, whatever its shape; each kind of fault at ten times the floor fails, named."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.comparison.floor import FACTOR, Judged, beyond_floor, chance, half_ulp, judge_floor
from paritykit.comparison.metrics import measure
from paritykit.comparison.noise import Noise
from paritykit.comparison.spread import SpreadMeter

FLOOR = 1e-2
ROWS, FEATURES = 60, 64


def noise(truth: torch.Tensor, twin: torch.Tensor, candidate: torch.Tensor) -> Noise:
    meter = SpreadMeter()
    meter.update(truth, twin, candidate)
    return meter.result()


def judged(
    truth: torch.Tensor,
    twin: torch.Tensor,
    candidate: torch.Tensor,
    *,
    dtype: str = "float32",
    factor: float = FACTOR,
    pooled: float = 0.0,
) -> Judged:
    return judge_floor(
        measure(truth, candidate), noise(truth, twin, candidate), dtype=dtype, factor=factor, pooled=pooled
    )


def drawn(rows: int = ROWS, features: int = FEATURES, *, seed: int = 0, sink: float = 1.0) -> list[torch.Tensor]:
    """Truth, twin and candidate with noise of the same size, each row's in proportion to the row."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, features, generator=generator)
    truth[0] *= sink
    sizes = truth.norm(dim=1, keepdim=True) / math.sqrt(features)
    return [truth, *(truth + FLOOR * sizes * torch.randn(truth.shape, generator=generator) for _ in range(2))]


@settings(max_examples=150)
@given(
    st.integers(0, 10**6),
    st.integers(1, 80),
    st.sampled_from([1, 3, 16, 100, 400]),
    st.sampled_from([1.0, 300.0]),
)
def test_equal_noise_passes_whatever_the_shape(seed: int, rows: int, features: int, sink: float) -> None:
    found = judged(*drawn(rows, features, seed=seed, sink=sink))
    assert found.verdict == "pass", found
    assert found.metric == "rel_l2"
    assert found.source.startswith("2 x noise floor")


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_less_noise_than_the_twin_passes(seed: int, share: float) -> None:
    truth, twin, candidate = drawn(seed=seed)
    assert judged(truth, twin, truth + share * (candidate - truth)).verdict == "pass"


def everywhere(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return truth + 10 * (clean - truth)


def one_row(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    wrong = clean.clone()
    wrong[17] = truth[17] + 10 * (clean[17] - truth[17])
    return wrong


def last_rows(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    wrong = clean.clone()
    wrong[-4:] = truth[-4:] + 10 * (clean[-4:] - truth[-4:])
    return wrong


def one_channel(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    wrong = clean.clone()
    wrong[:, 5] = truth[:, 5] + 10 * (clean[:, 5] - truth[:, 5])
    return wrong


def hidden_factor(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """A third of the floor: the whole error grows by a twentieth."""
    return clean - FLOOR / 2 * truth


def hidden_factors_of_rows(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    signs = torch.where(torch.arange(len(truth)) % 2 == 0, 1.0, -1.0)
    return clean + 1.5 * FLOOR * signs[:, None] * truth


def hidden_factors_of_channels(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    signs = torch.where(torch.arange(truth.shape[1]) % 2 == 0, 1.0, -1.0)
    return clean + FLOOR * signs * truth


def hidden_bias(truth: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    return clean + 1.2 * FLOOR * torch.randn(truth.shape[1], generator=torch.Generator().manual_seed(9))


FAULTS = {
    everywhere: {"typical_rel_l2", "rel_l2"},
    one_row: {"position_rel_l2"},
    last_rows: {"position_rel_l2"},
    one_channel: {"channel_rel_l2"},
    hidden_factor: {"scale"},
    hidden_factors_of_rows: {"row_scale"},
    hidden_factors_of_channels: {"channel_scale"},
    hidden_bias: {"channel_bias"},
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_fails_by_its_name(fault, seed: int) -> None:
    truth, twin, candidate = drawn(200, FEATURES, seed=seed)
    found = judged(truth, twin, fault(truth, candidate))
    assert found.verdict == "fail"
    assert found.metric in FAULTS[fault]
    assert found.value > found.allowed > (found.floor or 0.0) > 0


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.__name__.startswith("hidden")], ids=lambda f: f.__name__)
def test_what_is_hidden_leaves_the_whole_error_within_the_floor(fault) -> None:
    truth, twin, candidate = drawn(200, FEATURES)
    assert noise(truth, twin, fault(truth, candidate)).ratio < FACTOR


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([8, 64, 200]), st.sampled_from([1.0, 300.0]))
def test_ten_times_the_floor_fails_in_one_row_too(seed: int, rows: int, features: int, sink: float) -> None:
    truth, twin, candidate = drawn(rows, features, seed=seed, sink=sink)
    if features < 25:
        candidate = truth + 10 * (candidate - truth)
    assert judged(truth, twin, truth + 10 * (candidate - truth)).verdict == "fail"


@given(st.integers(0, 10**6), st.sampled_from(list(FAULTS)))
def test_the_smallest_factor_that_would_pass_is_told(seed: int, fault) -> None:
    truth, twin, candidate = drawn(seed=seed)
    wrong = fault(truth, candidate)
    needed = judged(truth, twin, wrong).needed
    assert needed is not None
    assert judged(truth, twin, wrong, factor=needed * 1.0001).verdict == "pass"
    assert judged(truth, twin, wrong, factor=needed * 0.9999).verdict == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number(value: float) -> None:
    truth, twin, candidate = drawn()
    candidate[3, 4] = value
    found = judged(truth, twin, candidate)
    assert (found.verdict, found.metric, found.value, found.needed) == ("fail", "nonfinite_mismatch", 1.0, None)
    truth[3, 4] = twin[3, 4] = value
    assert judged(truth, twin, candidate).verdict == "pass"


def ulps(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return (tensor.view(torch.int16) + count).view(torch.bfloat16)


def test_where_the_twin_is_exact_a_few_units_in_the_last_place_pass() -> None:
    truth = drawn()[0].bfloat16()
    rows = torch.arange(ROWS)[:, None] % 20 == 0
    for count in (0, 1, 2):
        found = judged(truth.float(), truth, torch.where(rows, ulps(truth, count), truth), dtype="bfloat16")
        assert (found.verdict, found.metric, found.allowed, found.floor) == ("pass", "max_ulp", 2.0, 0.0)
        assert "no noise here: 2 ULP of bfloat16" in found.source
    found = judged(truth.float(), truth, torch.where(rows, ulps(truth, 3), truth), dtype="bfloat16")
    assert (found.verdict, found.metric, found.value) == ("fail", "max_ulp", 3.0)
    found = judged(truth.float(), truth, ulps(truth, 1), dtype="bfloat16")
    assert (found.verdict, found.metric) == ("fail", "rel_l2")


def test_a_lucky_twin_is_taken_for_half_a_unit_in_the_last_place() -> None:
    truth = drawn()[0]
    twin = truth.clone()
    twin[0, 0] *= 1 + 1e-6
    found = judged(truth, twin, truth.bfloat16(), dtype="bfloat16")
    assert found.verdict == "pass"
    assert found.floor == half_ulp("bfloat16")
    assert "half an ULP" in found.source
    assert judged(truth, twin, truth * 1.01, dtype="bfloat16").verdict == "fail"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_a_unit_is_what_rounding_costs(dtype: str) -> None:
    values = torch.exp(torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5)
    rounded = values.to(getattr(torch, dtype)).double()
    assert half_ulp(dtype) == pytest.approx(float((rounded - values).norm() / values.norm()), rel=0.15)


def test_neighbours_lend_their_floor_to_a_lucky_twin() -> None:
    truth, twin, candidate = drawn()
    lucky = truth + (twin - truth) / 20
    assert judged(truth, lucky, candidate).verdict == "fail"
    found = judged(truth, lucky, candidate, pooled=FLOOR)
    assert (found.verdict, found.floor) == ("pass", FLOOR)
    assert "of its neighbours" in found.source
    assert judged(truth, truth, candidate, pooled=FLOOR).verdict == "pass"
    assert judged(truth, truth, candidate).verdict == "fail"


def test_a_truth_of_zeros() -> None:
    zeros, some = torch.zeros(4, 8), torch.eye(4, 8)
    assert judged(zeros, zeros, zeros).verdict == "pass"
    assert judged(zeros, zeros, some).verdict == "fail"
    assert judged(zeros, some, some).verdict == "pass"
    assert judged(some, zeros, zeros).verdict == "pass"
    assert judged(zeros, some, 100 * some).verdict == "fail"


def test_positions_beyond_the_floor() -> None:
    truth, twin, candidate = drawn()
    wrong = one_row(truth, candidate)
    flagged = beyond_floor(noise(truth, twin, wrong), dtype="float32")
    assert flagged[17]
    assert sum(flagged) == 1
    assert not any(beyond_floor(noise(truth, twin, candidate), dtype="float32"))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_chance_shrinks_with_numbers(first: int, second: int) -> None:
    low, high = sorted((first, second))
    assert chance(low) >= chance(high) > 1


def test_a_verdict_is_plain_data() -> None:
    found = judged(*drawn())
    assert msgspec.json.decode(msgspec.json.encode(found), type=Judged) == found
