"""Readings: whatever a candidate's point is made of, the reading that is found gives the reference's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.comparison.align import rule_rows
from paritykit.comparison.readings import Search, best_readings, kind_of, layer_of, read_alike
from paritykit.mapping.feeding import can_feed
from paritykit.mapping.rules import Rule
from tests.made import write_capture

ROWS, WIDTH = 16, 6
POINT = "layers.1.block"


def drawn(seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed))


def capture(folder: Path, tensors: dict[str, torch.Tensor]) -> Capture:
    return write_capture(folder, [([Segment(0, 0, ROWS)], tensors)])


BESIDE = {"layers.0": drawn(1), "layers.1.other": drawn(2), "layers.1.gate": drawn(3, 1), "layers.1.wide": drawn(4)}
WAYS: dict[str, tuple[Any, str]] = {
    "plus": (lambda t: t - BESIDE["layers.0"], "with layers.0 added"),
    "minus": (lambda t: t + BESIDE["layers.1.other"], "without layers.1.other"),
    "over sigmoid": (lambda t: t * BESIDE["layers.1.gate"].sigmoid(), "its output / sigmoid(layers.1.gate)"),
    "times": (lambda t: t / BESIDE["layers.1.wide"], "its output x layers.1.wide"),
    "factor": (lambda t: t / 3, "multiplied by 3"),
    "order": (lambda t: t[:, [3, 1, 2, 0, 5, 4]], "its columns in another order"),
    "other": (lambda t: drawn(9), "layers.1.where"),
}


def searched(folder: Path, how: str, truth: torch.Tensor) -> tuple[Search, Capture]:
    reference = capture(folder / "reference", {POINT: truth})
    beside = BESIDE | ({"layers.1.where": truth} if how == "other" else {})
    candidate = capture(folder / "candidate", {**beside, POINT: WAYS[how][0](truth)})
    rule = Rule(reference=POINT, candidate=POINT)
    return Search(rule, reference=reference, candidate=candidate, case="a"), candidate


@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(100, 10_000))
def test_a_reading_that_is_found_gives_the_reference(
    tmp_path_factory: pytest.TempPathFactory, how: str, seed: int
) -> None:
    truth = drawn(seed)
    search, candidate = searched(tmp_path_factory.mktemp("c"), how, truth)
    first = best_readings(search.fits())[0]
    assert (first.reading.how, first.rule.reading) == (how, WAYS[how][1])
    torch.testing.assert_close(rule_rows(first.rule, candidate, "a", 0, ROWS), truth, rtol=1e-4, atol=1e-4)
    assert can_feed(first.rule) == (how in ("other", "order"))
    assert first.rule.describe() != Rule(reference=POINT, candidate=POINT).describe()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(100, 10_000))
def test_nothing_fits_what_is_something_else(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("c")
    reference = capture(folder / "reference", {POINT: drawn(seed)})
    candidate = capture(folder / "candidate", {**BESIDE, POINT: drawn(seed + 1)})
    search = Search(Rule(reference=POINT, candidate=POINT), reference=reference, candidate=candidate, case="a")
    assert search.fits() == []


def test_a_reading_goes_on_to_the_next_layer(tmp_path: Path) -> None:
    search, _ = searched(tmp_path, "plus", drawn(100))
    fit = best_readings(search.fits())[0]
    later = Rule(reference="layers.4.block", candidate="layers.4.block")
    found = read_alike(fit, later, known={"layers.3", "layers.4.block"})
    assert found is not None
    assert (found.plus, found.reading) == ("layers.3", "with layers.3 added")
    assert read_alike(fit, later, known={"layers.4.block"}) is None
    first = Rule(reference="layers.0.block", candidate="layers.0.block")
    assert read_alike(fit, first, known={"layers.-1"}) is None


def test_a_kind_is_a_name_without_its_layer() -> None:
    assert kind_of("h.12.attn.q#input") == kind_of("h.3.attn.q#input") == "h.{}.attn.q#input"
    assert (layer_of("h.12.attn"), layer_of("norm")) == (12, None)
