"""Cases are the same for the same model, fit it, and a bad file says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.case import RECIPES, SETS, Case, CaseSet, Recipe, cases, read_cases, validate
from paritykit.errors import UnknownNameError, UsageError


@given(
    st.text(max_size=8),
    st.integers(1, 300),
    st.integers(0, 16),
    st.integers(1, 200_000),
    st.none() | st.integers(1, 300),
)
def test_a_drawn_case_fits_its_model(name: str, length: int, new: int, vocab: int, most: int | None) -> None:
    case = Recipe(length, new).draw(name, vocab_size=vocab, max_positions=most)
    assert case == Recipe(length, new).draw(name, vocab_size=vocab, max_positions=most)
    assert 1 <= len(case.tokens) <= length
    assert all(0 <= token < vocab for token in case.tokens)
    assert len(case.tokens) == 1 or vocab - 1 in case.tokens
    if most is None or most > new:
        validate([case], vocab_size=vocab, max_positions=most)


def test_names_draw_different_tokens() -> None:
    one, two = (Recipe(40).draw(name, vocab_size=500) for name in ("one", "two"))
    assert one.tokens != two.tokens


def test_sets_and_names_mix_without_repeats() -> None:
    found = cases("short", "smoke", "one")
    assert found.ids() == ["short", "long-40", "long-200", "one"]
    assert [case.id for case in found.resolve(vocab_size=500)] == found.ids() == list(found)
    assert cases().ids() == cases("smoke").ids()


@pytest.mark.parametrize("name", [*RECIPES, *(name for name in SETS if name != "text")])
def test_every_shipped_name_resolves(name: str) -> None:
    found = cases(name).resolve(vocab_size=500, max_positions=256)
    assert len(found) >= 1
    assert all(case.positions <= 256 for case in found)


def test_an_unknown_name_is_a_usage_error() -> None:
    with pytest.raises(UnknownNameError, match="unknown case 'smok'; did you mean 'smoke'"):
        cases("smok")


@pytest.mark.parametrize(("tokens", "new", "positions"), [(5, 0, 5), (5, 1, 5), (5, 8, 12), (1, 2, 2)])
def test_positions_computed(tokens: int, new: int, positions: int) -> None:
    assert Case(id="a", tokens=(0,) * tokens, new_tokens=new).positions == positions


@given(st.lists(st.integers(0, 99), max_size=12), st.integers(0, 8))
def test_forcing_keeps_the_rest(generated: list[int], new: int) -> None:
    case = Case(id="a", tokens=(1, 2), new_tokens=new, batch=3)
    forced = case.force(iter(generated))
    assert forced.forced == tuple(generated[:new])
    assert msgspec.structs.replace(forced, forced=()) == case


def test_a_decorated_test_runs_once_for_each_case(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    parity_cases: the cases of a test\n")
    pytester.makepyfile(
        """
        from paritykit.case import cases

        @cases("short", "ragged-batch")
        def test_modules(case, request):
            found = request.node.get_closest_marker("parity_cases").args[0]
            assert case in found.ids()
        """
    )
    outcome = pytester.runpytest_subprocess("-v")
    outcome.assert_outcomes(passed=4)
    outcome.stdout.fnmatch_lines(["*test_modules?short?*", "*test_modules?ragged-33?*"])


LINES = st.fixed_dictionaries(
    {
        "id": st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        "tokens": st.lists(st.integers(0, 10**6), min_size=1, max_size=9),
    },
    optional={"new_tokens": st.integers(0, 20), "batch": st.integers(0, 5)},
)


@given(lines=st.lists(LINES, min_size=1, max_size=5), ascii_only=st.booleans())
def test_a_file_gives_its_cases(
    tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]], ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "cases.jsonl"
    path.write_text("\n".join(json.dumps(x, ensure_ascii=ascii_only) for x in lines) + "\n\n", encoding="utf-8")
    assert read_cases(path) == [Case(**{**line, "tokens": tuple(line["tokens"])}) for line in lines]


@pytest.mark.parametrize(("line", "said"), [
    ("{", "line 2: "),
    ("[]", "line 2: Expected `object`"),
    ('{"tokens": [1]}', "line 2: .*missing required field `id`"),
    ('{"id": "b"}', 'line 2: no "tokens"'),
    ('{"id": "b", "tokens": []}', 'line 2: no "tokens"'),
    ('{"id": "b", "tokens": [1.5]}', "line 2: Expected `int`"),
    ('{"id": "b", "tokens": [true]}', "line 2: Expected `int`"),
    ('{"id": "b", "tokens": [1], "new": 3}', "line 2: .*unknown field `new`"),
    ('{"id": "b", "tokens": [1], "new_tokens": -1}', 'line 2: "new_tokens" must be'),
    ('{"id": "b", "tokens": [1], "new_tokens": 1, "forced": [2, 3]}', 'line 2: "new_tokens" must be'),
])  # fmt: skip
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(f'{{"id": "a", "tokens": [1]}}\n{line}\n')
    with pytest.raises(UsageError, match=said):
        read_cases(path)


@pytest.mark.parametrize(("content", "said"), [(b"\n \n", "has no cases"), (b"\xff\xfe", "cannot read cases from")])
def test_a_file_without_cases(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_cases(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read cases from .*gone\.jsonl"):
        cases(file=tmp_path / "gone.jsonl")


@pytest.mark.parametrize(("case", "said"), [
    (Case(id="b", tokens=(1, 500)), "case 'b': token id 500 is outside the vocabulary .0 to 499."),
    (Case(id="b", tokens=(-1,)), "token id -1 is outside the vocabulary"),
    (Case(id="b", tokens=(1,), new_tokens=1, forced=(500,)), "token id 500 is outside"),
    (Case(id="b", tokens=(1,) * 30, new_tokens=3), "30 tokens and 3 new ones are more than the model's 32 positions"),
    (Case(id="a", tokens=(1,)), "case id 'a' is used twice"),
])  # fmt: skip
def test_cases_that_the_model_cannot_take(case: Case, said: str) -> None:
    fixed = [Case(id="a", tokens=(1,)), case]
    with pytest.raises(UsageError, match=said):
        CaseSet((), fixed).resolve(vocab_size=500, max_positions=32)


def test_a_case_without_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="case 'empty' has no tokens"):
        validate([Case(id="empty", tokens=())], vocab_size=10)
