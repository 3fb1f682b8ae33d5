"""What is computed decides: one name for two things is read or named, and a fault beside it is still found."""

from __future__ import annotations

import pytest

from paritykit.meanings import settle
from paritykit.reports.terminal import render
from tests.meanings import LAYERS, Cut, at, compared

CUTS = {
    "output plus residual": (Cut(), Cut(residual_in=True), "mixer", "without layers.{}.norm#input"),
    "output minus residual": (Cut(residual_in=True), Cut(), "mixer", "with layers.{}.norm#input added"),
    "product with a gate": (Cut(), Cut(gate_in=True), "block.expert", "its output / sigmoid(layers.{}.block.gate)"),
    "no gate": (Cut(gate_in=True), Cut(), "block.expert", "its output x sigmoid(layers.{}.block.gate)"),
}
FAULTS = {"mixer": "mixer.o.weight", "block.expert": "block.expert.down.weight"}


@pytest.mark.parametrize("name", CUTS)
def test_another_meaning_is_read_at_every_layer(name: str) -> None:
    reference, candidate, point, reading = CUTS[name]
    results = compared(reference, candidate)
    assert results.summary.verdict == "pass", results.summary
    assert results.summary.failed == 0
    for layer in range(LAYERS):
        found = at(results, f"layers.{layer}.{point}")
        assert {f.verdict for f in found} == {"pass"}
        assert {f.reading for f in found} == {reading.format(layer)}
    assert {f.reading for f in results.findings if not f.point.endswith(point)} == {""}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("where", [0, LAYERS - 1])
def test_a_fault_in_what_is_named_alike_is_found_at_its_place(name: str, where: int) -> None:
    reference, candidate, point, _ = CUTS[name]
    wrong = FAULTS[point]
    cut = {n: getattr(candidate, n) for n in candidate.__struct_fields__} | {"wrong": wrong, "where": where}
    results = compared(reference, Cut(**cut))
    assert results.summary.verdict == "fail"
    first = results.summary.first_divergence
    assert first is not None
    assert first.point == f"layers.{where}.{wrong.removesuffix('.weight')}"
    assert first.origin == "introduced"


def test_a_constant_factor_is_read() -> None:
    results = compared(Cut(scaled_in=True), Cut())
    assert results.summary.verdict == "pass", results.summary
    assert {f.reading for f in at(results, "embed")} == {"multiplied by 3"}
    results = compared(Cut(scaled_in=True), Cut(scale=3.3))
    assert results.summary.verdict == "fail"
    assert {f.verdict for f in at(results, "layers.0.norm#input")} == {"fail"}


def test_rows_in_another_order_on_both_sides_of_a_product_are_read() -> None:
    results = compared(Cut(), Cut(turned=("q", "k")))
    assert results.summary.verdict == "pass", results.summary
    assert {f.reading for f in at(results, "layers.1.mixer.q")} == {"its columns in another order"}
    results = compared(Cut(), Cut(turned=("k",)))
    assert results.summary.verdict == "fail"
    first = results.summary.first_divergence
    assert first is not None
    assert first.point == "layers.0.mixer.k"


def test_what_no_reading_fits_is_named_alike_counted_and_shown() -> None:
    results = compared(Cut(), Cut(odd=True))
    assert results.summary.verdict == "pass", results.summary
    named = [f for f in results.findings if f.kind == "named_alike"]
    assert {(f.point, f.verdict) for f in named} == {(f"layers.{n}.block", "skip") for n in range(LAYERS)}
    modules = next(c for c in results.coverage if c.check == "modules")
    assert modules.compared + LAYERS == modules.points
    assert b"named alike" in render(results)


@pytest.mark.parametrize("where", range(LAYERS))
def test_what_is_named_alike_hides_no_fault_behind_it(where: int) -> None:
    results = compared(Cut(), Cut(odd=True, wrong="mixer.o.weight", where=where))
    assert results.summary.verdict == "fail"
    first = results.summary.first_divergence
    assert first is not None
    assert first.point == f"layers.{where}.mixer.o"


@pytest.mark.parametrize("wrong", ["", "mixer.o.weight"])
@pytest.mark.parametrize("where", range(1, LAYERS))
def test_a_size_that_does_not_fit_is_no_failure_in_any_layer(where: int, wrong: str) -> None:
    """Behind a fault all that is computed from such a point fails, which says nothing of it; before it nothing does."""
    results = compared(Cut(), Cut(odd=True, narrow=True, wrong=wrong, where=where))
    assert not [f for f in results.findings if f.metric == "shape"]
    assert results.summary.verdict == ("fail" if wrong else "pass")
    first = results.summary.first_divergence
    assert (first.point if first else "") == (f"layers.{where}.mixer.o" if wrong else "")


def test_a_small_fault_that_the_residual_dilutes_stays_a_failure() -> None:
    """The last layer's output is a thousandth of the stream: what follows agrees, and the module is wrong."""
    clean, wrong = Cut(scale=3000.0), Cut(scale=3000.0, wrong="block.plain.weight", by=1.0 + 3e-6, where=LAYERS - 1)
    assert compared(clean, clean).summary.verdict == "pass"
    results = compared(clean, wrong)
    assert results.summary.checks["logits"] == "pass"
    failing = {f.point for f in results.findings if f.verdict == "fail"}
    assert f"layers.{LAYERS - 1}.block.plain" in failing
    assert not [f for f in results.findings if f.kind == "named_alike"]


def test_a_clean_run_is_left_as_it_is() -> None:
    results = compared(Cut(), Cut())
    assert results.summary.verdict == "pass"
    assert {(f.kind, f.reading) for f in results.findings} == {("", "")}
    assert settle(None, results.findings) is results.findings  # type: ignore[arg-type]
