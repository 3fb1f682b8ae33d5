"""What a kernel loses that cuts what it stores, told from a wrong factor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.captures.manifest import Segment
from paritykit.case import Case
from paritykit.checks.base import Subject
from paritykit.checks.measured import measure_point
from paritykit.comparison.cutting import CUTS, CutMeter, put_back
from paritykit.comparison.ensemble import Ensemble, EnsembleWriter
from paritykit.engines.drawing import _joined, _measured
from paritykit.mapping.build import build_mapping
from paritykit.results import Finding
from tests.made import write_capture

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
ROWS, FEATURES = 60, 64
SCALED = 0.997


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed))


def cut(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers in ``dtype`` that are no larger."""
    near = wide.to(dtype)
    smaller = torch.nextafter(near, torch.zeros_like(near))
    return torch.where(near.abs().double() > wide.abs().double(), smaller, near)


def lost(truth: torch.Tensor, candidate: torch.Tensor) -> float:
    meter = CutMeter(candidate.dtype)
    half = len(truth) // 2
    meter.update(truth[:half], candidate[:half])
    meter.update(truth[half:], candidate[half:])
    return meter.result()


@given(st.integers(0, 10**6), HALVES)
def test_a_cut_is_seen_and_put_back(seed: int, dtype: torch.dtype) -> None:
    truth = numbers(seed)
    stored = cut(truth, dtype)
    assert lost(truth, stored) == pytest.approx(0.5, abs=0.15)
    whole = put_back(stored, 0.5, dtype)
    bias = [float(((x.double() - truth) * truth.sign()).mean() / truth.abs().mean()) for x in (stored, whole)]
    assert abs(bias[1]) < 0.1 * abs(bias[0])


@given(st.integers(0, 10**6), HALVES, st.floats(0.99, 1.0))
def test_a_factor_and_rounding_are_no_cut(seed: int, dtype: torch.dtype, factor: float) -> None:
    truth = numbers(seed)
    unit = 2 * (1 - factor) / torch.finfo(dtype).eps  # of the largest mantissa
    if unit < 3:
        assert lost(truth, (factor * truth).to(dtype)) < 0.2
    assert 0.0 <= lost(truth, (factor * truth).to(dtype)) <= CUTS[-1]


def test_nothing_is_said_of_few_numbers_or_of_zeros() -> None:
    assert lost(torch.zeros(20, 8), torch.zeros(20, 8, dtype=torch.bfloat16)) == 0.0
    few = numbers(1)[:2, :8]
    assert lost(few, cut(few, torch.bfloat16)) == 0.0
    assert torch.equal(put_back(torch.zeros(3), 0.5, torch.bfloat16), torch.zeros(3, dtype=torch.float64))


@given(st.integers(0, 10**6), HALVES)
def test_few_numbers_tell_of_a_whole_cut_and_of_no_other(seed: int, dtype: torch.dtype) -> None:
    few = numbers(seed)[:12, :16]
    assert lost(few, cut(few, dtype)) in CUTS


def judged(folder: Path, candidate: torch.Tensor, *, seed: int = 4) -> Finding:
    """Of a point that no draw differs at: nothing before it is a product."""
    truth = numbers(seed)[: len(candidate), : candidate.shape[1]]
    case = Case(id="a", tokens=tuple(range(len(candidate))))
    segments = [Segment(0, 0, len(candidate))]
    twin = truth.bfloat16()
    sides = {"truth": truth, "twin": twin, "candidate": candidate}
    made = {n: write_capture(folder / n, [(segments, {"x": rows})], cases=[case]) for n, rows in sides.items()}
    writer = EnsembleWriter()
    writer.add(_joined(_measured(truth, torch.stack([twin] * 8))), point="x", case="a")
    (folder / "drawn").mkdir()
    writer.write(folder / "drawn", draws=8, seed=0, dtype="bfloat16")
    mapping = build_mapping(made["truth"].manifest, made["candidate"].manifest)
    subject = Subject(
        reference=made["truth"],
        candidate=made["candidate"],
        mapping=mapping,
        twin=made["twin"],
        ensemble=Ensemble.open(folder / "drawn"),
    )
    return measure_point(subject, mapping.rules[0], "a", check="modules")


def test_a_kernel_may_cut_what_it_stores(tmp_path: Path) -> None:
    found = judged(tmp_path, cut(numbers(4), torch.bfloat16))
    assert found.verdict == "pass", found
    assert "put back, as a kernel cut it" in found.allowed_source


def test_a_kernel_may_cut_the_few_numbers_of_a_short_case(tmp_path: Path) -> None:
    for seed in range(12):
        (tmp_path / str(seed)).mkdir()
        found = judged(tmp_path / str(seed), cut(numbers(seed)[:12, :16], torch.bfloat16), seed=seed)
        assert found.verdict == "pass", (seed, found)


def test_a_factor_that_is_as_far_off_fails(tmp_path: Path) -> None:
    found = judged(tmp_path, (SCALED * numbers(4)).bfloat16())
    assert (found.verdict, found.metric) == ("fail", "scale")
