"""Texts that the twin also reads at once: the same tokens at the same positions, where most of them were decoded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import paritykit as pk
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.comparison.metrics import measure
from paritykit.comparison.twin import AT_ONCE, read_at_once, twin_cases, twin_error
from paritykit.engines.hf import HFEngine
from paritykit.reference import Reference, Role
from paritykit.testing import tiny_model
from tests.nano import one_thread

TOKENS = st.lists(st.integers(0, 400), min_size=1, max_size=12).map(tuple)


@given(TOKENS, TOKENS, st.integers(0, 14), st.integers(0, 3))
def test_the_same_tokens_at_the_same_positions(
    prompt: tuple[int, ...], text: tuple[int, ...], new: int, batch: int
) -> None:
    case = Case(id="a", tokens=prompt, new_tokens=new, batch=batch).force(text)
    found = read_at_once([case])
    fed = (*case.tokens, *case.forced)[: case.positions]
    assert [c.tokens for c in found] == [fed] * (new > len(prompt) and len(fed) == case.positions)
    assert all((c.positions, c.batch, c.id) == (case.positions, batch, "a" + AT_ONCE) for c in found)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = str(tiny_model("qwen2", num_hidden_layers=2))
    found = Reference(truth=Role(engine=HFEngine(path, dtype="float64")), twin=Role(engine=HFEngine(path)))
    cases = pk.cases("one", "short", "long-40").resolve(vocab_size=499, max_positions=512)
    found.prepare(folder=tmp_path_factory.mktemp("reference"), cases=cases, progress=None)
    return found


def test_the_twin_reads_them_in_its_own_pass_and_the_larger_error_is_its_floor(reference: Reference) -> None:
    with one_thread():
        truth, twin = reference.capture, reference.twin_capture
    assert isinstance(twin, Capture)
    assert reference.starts == {"reference": 1, "twin": 1}
    assert list(truth.cases) == ["one", "short", "long-40"]
    assert [twin_cases(twin, c) for c in truth.cases] == [
        ["one", "one at once"],
        ["short", "short at once"],
        ["long-40"],
    ]
    for case in truth.cases:
        errors = [measure(truth.rows("model.norm", case), twin.rows("model.norm", c)) for c in twin_cases(twin, case)]
        assert twin_error(truth, twin, "model.norm", case) == max(e.rel_l2 for e in errors)
