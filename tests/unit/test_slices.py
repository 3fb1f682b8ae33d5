"""Which part is wrong: laws that hold for any numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from paritykit.captures.manifest import leading_points
from paritykit.diagnose.slices import (
    Axis,
    Errors,
    axes_of,
    feature_slices,
    find_slices,
    head_size,
    routed_shares,
    wrong_experts,
    wrong_groups,
)
from paritykit.mapping.rules import Block, Rule
from paritykit.results import Finding, Slice
from tests.made import write_capture
from tests.scenes import numbers

NOISE = 1e-6
ALLOWED = 3 * NOISE


def errors_of(reference: torch.Tensor, candidate: torch.Tensor) -> Errors:
    found = Errors(reference.shape[1])
    found.update(0, reference, candidate)
    return found


def noisy(rows: torch.Tensor, seed: int = 7) -> torch.Tensor:
    return rows * (1 + NOISE * numbers(*rows.shape, seed=seed))


@st.composite
def parts(draw: st.DrawFn) -> tuple[torch.Tensor, Axis, torch.Tensor]:
    """Rows, an axis whose groups may be of unlike size and scale, and the groups that are wrong: some, not all."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=9))
    scales = draw(st.lists(st.sampled_from([0.1, 1.0, 3.0]), min_size=len(sizes), max_size=len(sizes)))
    wrong = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    assume(any(wrong) and not all(wrong))
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = numbers(draw(st.integers(4, 30)), len(group), seed=draw(st.integers(0, 99)))
    return rows * torch.tensor(scales)[group], Axis("heads", len(sizes), group), torch.tensor(wrong)


@given(made=parts(), size=st.sampled_from([1e-3, 0.1, 2.0]))
def test_the_groups_that_are_wrong_are_told(made: tuple[torch.Tensor, Axis, torch.Tensor], size: float) -> None:
    rows, axis, wrong = made
    error = size * numbers(*rows.shape, seed=3) * rows.norm() / rows.numel() ** 0.5
    found = wrong_groups(errors_of(rows, noisy(rows) + error * wrong[axis.group]), axis, allowed=ALLOWED)
    assert found.tolist() == wrong.tolist()


@given(made=parts(), size=st.sampled_from([0.0, 1e-3, 0.1]))
def test_what_is_right_or_wrong_everywhere_has_no_part(
    made: tuple[torch.Tensor, Axis, torch.Tensor], size: float
) -> None:
    rows, axis, _ = made
    candidate = noisy(rows) + size * rows.norm() / rows.numel() ** 0.5
    assert not wrong_groups(errors_of(rows, candidate), axis, allowed=ALLOWED).any()


@given(
    experts=st.integers(3, 12),
    chosen=st.integers(1, 2),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_experts_that_are_wrong_are_told_or_nothing_is(
    experts: int, chosen: int, seed: int, data: st.DataObject
) -> None:
    planted = data.draw(st.sets(st.integers(0, experts - 1), min_size=1, max_size=2))
    shares = routed_shares(numbers(200, experts, seed=seed), chosen)
    assert shares.sum(1).allclose(torch.ones(200))
    assert ((shares > 0).sum(1) == chosen).all()
    wrong = (shares[:, sorted(planted)] > 0).any(1)
    found = wrong_experts(shares, wrong)
    assert set(found) == (set() if wrong.all() else planted)


def test_experts_that_cannot_be_told_apart_are_not_guessed() -> None:
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert wrong_experts(shares, torch.tensor([True, True, False])) == []
    assert wrong_experts(shares, torch.tensor([True, True, True])) == []
    assert wrong_experts(shares, torch.tensor([False, False, False])) == []


def test_features_are_told_where_they_say_more_than_heads() -> None:
    rows = numbers(20, 24)
    heads = Axis("heads", 4, torch.arange(24) // 6)
    elements = Axis("elements of each head", 6, torch.arange(24) % 6)
    each = Axis("features", 24, torch.arange(24))

    def told(wrong: slice | list[int]) -> list[str]:
        candidate = noisy(rows)
        candidate[:, wrong] += 1.0
        errors = errors_of(rows, candidate)
        return [s.describe() for s in feature_slices(errors, [heads, elements, each], allowed=ALLOWED)]

    assert told(slice(6, 18)) == ["heads 1-2 of 4"]
    assert told([1, 7, 13, 19]) == ["element 1 of 6 of each head"]
    assert told([7]) == ["head 1 of 4", "element 1 of 6 of each head"]
    assert told([7, 8, 20]) == ["heads 1, 3 of 4", "elements 1-2 of 6 of each head", "features 7-8, 20 of 24"]
    assert told(slice(1, 23)) == []
    assert told(slice(0, 24)) == []
    assert told([]) == []


def test_rows_that_are_no_numbers_are_left_out() -> None:
    rows = numbers(3, 4)
    bad = rows.clone()
    bad[1, 2] = torch.nan
    found = errors_of(rows, bad)
    assert found.places == [0, 2]
    assert found.error.sum() == 0


POINTS = {"att.q": 12, "att.k": 6, "att.o#input": 12, "att.o": 8, "att": 8, "mlp": 12}
HEADS = {"att.q": 3, "att.k": 3, "att.o#input": 3, "att#key_cache": 3, "att.o": 0, "att": 0, "mlp": 0}


def test_heads_are_those_of_projections_and_caches(tmp_path: Path) -> None:
    from paritykit.captures.manifest import Segment

    tensors = {k: numbers(4, n) for k, n in list(POINTS.items())[:2]}
    tensors |= {"att#key_cache": numbers(4, 2, 3), "att#value_cache": numbers(4, 2, 3)}
    tensors |= {k: numbers(4, n) for k, n in list(POINTS.items())[2:]}
    capture = write_capture(tmp_path / "capture", [([Segment(0, 0, 4)], tensors)])
    points = leading_points(capture.manifest.points)
    assert {k: head_size(points, points[k]) for k in HEADS} == HEADS
    rule = Rule(reference="att.q", candidate="q", blocks=(Block(0, 0, 6), Block(1, 0, 6)))
    axes = {a.name: a for a in axes_of(capture.manifest, points["att.q"], rule)}
    assert {n: a.of for n, a in axes.items()} == {"ranks": 2, "heads": 4, "elements of each head": 3, "features": 12}
    assert axes["ranks"].group.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize("wrong", [slice(2, 4), slice(0, 0)])
def test_the_part_of_a_finding(tmp_path: Path, wrong: slice) -> None:
    from paritykit.captures.manifest import Segment

    rows = numbers(6, 8)
    changed = noisy(rows)
    changed[:, wrong] += 1
    reference, candidate = (
        write_capture(tmp_path / name, [([Segment(0, 0, 6)], {"m": x})])
        for name, x in (("reference", rows), ("candidate", changed))
    )
    finding = Finding(check="modules", case="a", point="m", verdict="fail", metric="rel_l2", value=1.0, allowed=ALLOWED)
    found = find_slices(finding, Rule(reference="m", candidate="m"), reference=reference, candidate=candidate)
    assert found == ([Slice(axis="features", which=[(2, 3)], of=8)] if wrong.stop else [])
