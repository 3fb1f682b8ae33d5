"""Stand-ins and scores: laws that hold for any numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.captures.manifest import Segment
from paritykit.case import Case
from paritykit.diagnose.bench.columns import Columns
from paritykit.diagnose.bench.kvcache import Held
from paritykit.diagnose.bench.linear import linear_shares
from paritykit.diagnose.bench.rotation import Rotation, base_of, measure, powers
from paritykit.diagnose.causes.cache import judged
from paritykit.diagnose.causes.cap import fitted
from paritykit.diagnose.causes.pooling import pooled_activation, pooling_type
from paritykit.diagnose.explain import causes_of
from paritykit.diagnose.trial import Bar, Trial
from tests.made import write_capture
from tests.scenes import TOKENS, numbers, scene_of

# rotation


@given(
    theta=st.floats(100.0, 1e6),
    pairs=st.integers(1, 16),
    interleaved=st.booleans(),
    magnitude=st.floats(0.5, 2.0),
    before=st.builds(numbers, st.just(40), st.integers(1, 3), st.just(34), seed=st.integers(0, 99)),
)
def test_a_rotation_is_measured_from_what_it_turned(
    theta: float, pairs: int, interleaved: bool, magnitude: float, before: torch.Tensor
) -> None:
    made = Rotation(2 * pairs, powers(theta, 2 * pairs), interleaved, magnitude)
    place = torch.arange(40)
    found = measure(before, made.turn(before, place), place, dims=made.dims, interleaved=interleaved)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-3)
    again = found.turn(before, place)
    assert float((again - made.turn(before, place)).norm() / before.norm()) < 1e-4


@given(theta=st.floats(10.0, 1e7), dims=st.sampled_from([8, 32, 128]))
def test_the_base_of_plain_frequencies_is_found(theta: float, dims: int) -> None:
    assert base_of(powers(theta, dims), dims) == pytest.approx(theta, rel=1e-3)


def test_scaled_frequencies_have_no_base() -> None:
    assert base_of(powers(10000.0, 32) / 4, 32) is None


def test_a_rotation_leaves_position_0_and_what_is_beyond_its_dims() -> None:
    made, x = Rotation(4, powers(100.0, 4)), numbers(5, 2, 8)
    turned = made.turn(x, torch.arange(5))
    assert torch.allclose(turned[0], x[0])
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))


# another matrix


@pytest.mark.parametrize("width", [16, 96])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_what_a_matrix_makes_of_the_input_is_told_by_other_positions(width: int, noise: float) -> None:
    x = numbers(60, 8) @ numbers(8, width, seed=1) + 0.3 * numbers(60, width, seed=2)
    made, bias = x @ numbers(width, 50, seed=3), 100.0 * numbers(50, seed=4)
    other = noise * float(made.std()) * numbers(60, 50, seed=5)
    share, expected = linear_shares(x.double(), (made + other + bias).double(), noise=float(other.norm()))
    assert expected > 0.5
    assert share == pytest.approx(expected, abs=0.1)


def test_what_no_matrix_makes_of_the_input_is_not() -> None:
    x, weight = numbers(60, 8) @ numbers(8, 32, seed=1), numbers(50, 32, seed=3)
    mixed_up = (x.roll(1, dims=0) - x) @ weight.T
    rounded = (x @ weight.T).to(torch.bfloat16).float() - x @ weight.T
    for error in (mixed_up, rounded, numbers(60, 50, seed=5)):
        share, expected = linear_shares(x.double(), error.double(), noise=0.01 * float(error.norm()))
        assert share < 0.5 * expected
    assert linear_shares(x.double(), 0 * mixed_up.double(), noise=0.0) == (0.0, 0.0)


# scores


def bar_of(folder: Path, difference: torch.Tensor) -> tuple[Bar, torch.Tensor]:
    ours = numbers(TOKENS, 6)
    scene = scene_of(folder, "m", {"m": ours}, {"m": ours + difference})
    return Bar(scene), ours


def test_a_prediction_that_is_the_candidate_leaves_nothing(tmp_path: Path) -> None:
    bar, ours = bar_of(tmp_path, 0.1 * numbers(TOKENS, 6, seed=1))
    tried = bar.hold(Trial("x", lambda _: bar.candidate))
    assert (tried.residual, tried.fits) == (0.0, True)
    unchanged = bar.hold(Trial("x", lambda _: ours))
    assert unchanged.residual == pytest.approx(1.0)
    assert not unchanged.fits


def test_half_of_a_difference_is_no_explanation(tmp_path: Path) -> None:
    difference = 0.1 * numbers(TOKENS, 6, seed=1)
    bar, ours = bar_of(tmp_path, difference)
    tried = bar.hold(Trial("x", lambda _: ours + difference / 2))
    assert tried.residual == pytest.approx(0.5)
    assert not tried.fits


def test_one_position_that_is_not_explained_is_enough_against_it(tmp_path: Path) -> None:
    difference = 10 * numbers(TOKENS, 6, seed=1)
    difference[3] = 0.0
    bar, _ = bar_of(tmp_path, difference)
    almost = bar.candidate.clone()
    almost[3] += 1e-3
    assert not bar.hold(Trial("x", lambda _: almost)).fits


def test_a_hypothesis_that_says_little_does_not_fit(tmp_path: Path) -> None:
    bar, _ = bar_of(tmp_path, 0.1 * numbers(TOKENS, 6, seed=1))
    some = torch.full_like(bar.candidate, math.nan)
    some[0] = bar.candidate[0]
    assert not bar.hold(Trial("x", lambda _: some)).fits
    some[1:10] = bar.candidate[1:10]
    assert bar.hold(Trial("x", lambda _: some)).fits


def test_fitted_numbers_weigh_against_a_hypothesis(tmp_path: Path) -> None:
    bar, _ = bar_of(tmp_path, 0.1 * numbers(TOKENS, 6, seed=1))
    plain, free = (bar.hold(Trial("x", lambda _: bar.candidate, free=n)) for n in (0, 1))
    assert plain.weight == pytest.approx(100 * free.weight)


def test_a_prediction_of_another_shape_is_an_error(tmp_path: Path) -> None:
    bar, _ = bar_of(tmp_path, numbers(TOKENS, 6))
    with pytest.raises(ValueError, match="predicted"):
        bar.hold(Trial("x", lambda _: torch.zeros(TOKENS, 5)))


@given(factor=st.floats(0.5, 200.0))
def test_a_number_is_fitted_to_the_candidate(factor: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    ours = numbers(TOKENS, 6)
    made = scene_of(tmp_path_factory.mktemp("x"), "m", {"m": ours}, {"m": ours * factor})
    found = fitted(made, lambda value, _: ours * value, name="factor", low=0.1, high=1000.0)
    assert found == pytest.approx(factor, rel=1e-4)


# what is said


@pytest.mark.parametrize(("change", "name"), [
    (lambda x: 3 * x, "scale-factor"),
    (lambda x: x.bfloat16().float(), "dtype-rounding"),
    (lambda x: x[:1].expand_as(x), "tuple-output"),
    (lambda x: x + numbers(*x.shape, seed=5), "unknown"),
    (lambda x: x + 0.01 * x.pow(2), "unknown"),
])  # fmt: skip
def test_a_module_that_nothing_is_known_of(
    change: Callable[[torch.Tensor], torch.Tensor], name: str, tmp_path: Path
) -> None:
    ours = numbers(TOKENS, 6)
    (cause, *_) = causes_of(scene_of(tmp_path, "m", {"m": ours}, {"m": change(ours).contiguous()}))
    assert cause.name == name


def test_the_evidence_of_the_unknown_says_where_and_how_much(tmp_path: Path) -> None:
    ours = numbers(TOKENS, 6)
    theirs = ours.clone()
    theirs[4:, 2] = numbers(TOKENS - 4, seed=9)
    (cause,) = causes_of(scene_of(tmp_path, "m", {"m": ours}, {"m": theirs}))
    assert cause.name == "unknown"
    assert "8 of 12 positions differ from position 4 on" in cause.evidence
    assert "feature 2 of 6" in cause.evidence


def test_right_numbers_have_no_cause(tmp_path: Path) -> None:
    ours = numbers(TOKENS, 6)
    assert causes_of(scene_of(tmp_path, "m", {"m": ours}, {"m": ours * (1 + 1e-7)})) == []


def test_pooled_rows_are_told_by_tokens_and_function(tmp_path: Path) -> None:
    hidden = numbers(TOKENS, 6)
    last, mean = hidden[-1:], hidden.mean(0, keepdim=True)
    made = scene_of(tmp_path / "a", "pool", {"norm": hidden, "pool": last}, {"pool": mean}, rows=1)
    assert causes_of(made)[0].name == "pooling-type"
    assert [t.label for t in pooling_type(made)][1] == "pooled from the mean of all tokens instead of the last token"
    made = scene_of(tmp_path / "b", "pool", {"norm": hidden, "pool": last}, {"pool": last.softmax(-1)}, rows=1)
    assert causes_of(made)[0].name == "pooled-activation"
    assert list(pooled_activation(made))


# caches


@pytest.mark.parametrize("port", ["key_cache", "value_cache"])
def test_scales_of_a_cache_that_were_not_read_are_a_factor(tmp_path: Path, port: str) -> None:
    ours, scales = numbers(TOKENS, 2, 16), 100 + 50 * numbers(TOKENS, 2, 1, seed=1).tanh()
    point = f"m#{port}"
    found = causes_of(scene_of(tmp_path / "a", point, {point: ours}, {point: ours * scales}))
    assert found[0].name == "scale-factor"
    assert "of its own" in found[0].evidence
    other = causes_of(scene_of(tmp_path / "b", point, {point: ours}, {point: ours * numbers(TOKENS, 2, 16, seed=1)}))
    assert other[0].name != "scale-factor"
    here = (torch.arange(TOKENS) != 5)[:, None, None]
    for value in (0.0, torch.nan):
        lost = torch.where(here, ours + 1e-7 * numbers(TOKENS, 2, 16, seed=2), value)
        made = scene_of(tmp_path / f"{value}", point, {point: ours}, {point: lost}, floor=1e-7)
        assert causes_of(made)[0].name != "scale-factor"


@pytest.mark.parametrize(("waits", "name"), [(True, "stale"), (False, "table")])
def test_what_others_wrote_is_stale_where_a_request_waited_meanwhile(tmp_path: Path, waits: bool, name: str) -> None:
    cases = [Case(id=n, tokens=tuple(range(4)), new_tokens=4, forced=(1, 2, 3)) for n in "ab"]
    own, others = [Segment(0, start, 1) for start in (4, 5)], [Segment(1, start, 1) for start in (4, 5)]
    order = [[own[0]], [others[0]], [own[1]]] if waits else [[own[0], others[0]], [own[1], others[1]]]
    steps = [(list(segments), {"m": numbers(len(segments), 2)}) for segments in order]
    candidate = write_capture(tmp_path / "c", steps, cases=cases)
    row = torch.full((6,), -1)
    mine = Held(("a", "b"), 0, row == 0, row == 0, row, row)
    spoilt = replace(mine, wrong=row == -1, case=row + 2, position=row + 2)
    scene: Any = SimpleNamespace(candidate_capture=candidate, reference_capture=SimpleNamespace(cases=candidate.cases))
    assert judged(scene, {"a": spoilt, "b": replace(mine, own=1)}) == name


# features


@given(order=st.permutations(list(range(8))))
def test_blocks_that_move_as_a_whole_are_told_from_other_orders(order: list[int]) -> None:
    found = Columns(("m",), (8,), torch.tensor(order))
    whole = all(b - a == 1 for half in (order[:4], order[4:]) for a, b in pairwise(half))
    assert found.moves_blocks(2) == whole
    assert found.found == (order != list(range(8)))
