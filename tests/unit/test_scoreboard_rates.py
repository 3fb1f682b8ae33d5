"""From outcomes to rates, and from rates to the page: counts add up, and everything that was missed has its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.errors import UsageError
from paritykit.testing.faults import find
from paritykit.testing.scoreboard.judges import JUDGES
from paritykit.testing.scoreboard.outcome import Book, Outcome, read_outcomes
from paritykit.testing.scoreboard.page import read_board, render, write_page
from paritykit.testing.scoreboard.plan import SMOKE, Trial
from paritykit.testing.scoreboard.rates import Board, Counts, count, interval, level_of, make_board

ROOT = Path(__file__).parents[2]
FAULT = "rope-theta"


def outcome(
    *, fault: str = FAULT, kind: Any = "fault", level: str = "loud", model: str = "qwen2", **fields: Any
) -> Outcome:
    own = ("", SMOKE) if kind == "clean" else (fault, "")
    trial = Trial(kind=kind, engine="nano", model=model, dtype="float32", level=level, fault=own[0], when=own[1])
    cause = find(fault).cause if kind == "fault" else ""
    return Outcome(trial=trial, **{"group": "Some class", "cause": cause, "seconds": 1.0, **fields})


def hit(**fields: Any) -> Outcome:
    """Found, placed and explained."""
    right = {"verdict": "fail", "failed": ["modules"], "found_by": ["modules"], "exact": True, "near": True}
    judges = {"allclose": True, "cosine": False}
    return outcome(**{"ratio": 50.0, "causes": ["rope-theta"], "judges": judges, **right, **fields})


# rates


@given(whole=st.integers(1, 10_000), part=st.integers(0, 10_000))
def test_an_interval_holds_the_rate_and_narrows_with_the_count(whole: int, part: int) -> None:
    part = min(part, whole)
    low, high = interval(part, whole)
    assert 0 <= low <= part / whole + 1e-12
    assert part / whole - 1e-12 <= high <= 1
    wider = interval(part, whole)
    narrower = interval(4 * part, 4 * whole)
    assert narrower[1] - narrower[0] < wider[1] - wider[0]
    mirrored = interval(whole - part, whole)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_nothing_tried_says_nothing() -> None:
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(40, 40)[0] == pytest.approx(0.9124, abs=1e-4)


counts = st.builds(
    Counts,
    tried=st.integers(0, 99),
    found=st.integers(0, 99),
    three=st.integers(0, 99),
    judged=st.integers(0, 99),
    judges=st.dictionaries(st.sampled_from(list(JUDGES)), st.integers(0, 99)),
)


@given(a=counts, b=counts, c=counts)
def test_counts_add(a: Counts, b: Counts, c: Counts) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert (a + Counts()) == a
    assert (a + b).tried == a.tried + b.tried
    assert all((a + b).judges[n] == a.judges.get(n, 0) + b.judges.get(n, 0) for n in {**a.judges, **b.judges})


def test_what_was_found_placed_and_explained_is_counted() -> None:
    assert count(hit()) == Counts(
        tried=1, found=1, placed=1, exact=1, near=1, first=1, three=1, judged=1, judges={"allclose": 1, "cosine": 0}
    )
    lost = outcome(verdict="pass", causes=[], judges={})
    assert count(lost) == Counts(tried=1)
    by_another = hit(found_by=[], failed=["tokens"], judges={})
    assert count(by_another) == Counts(tried=1), "a check that the fault does not name"
    beside = count(hit(exact=False, near=True, causes=["rope-scaling", "rope-theta"]))
    assert (beside.placed, beside.exact, beside.near, beside.first, beside.three) == (1, 0, 1, 0, 1)
    fourth = count(hit(causes=["a", "b", "c", "rope-theta"]))
    assert (fourth.first, fourth.three) == (0, 0)
    nowhere = count(hit(exact=None, near=None))
    assert (nowhere.placed, nowhere.exact, nowhere.near) == (0, 0, 0)


@pytest.mark.parametrize(("made", "level"), [
    (hit(), "loud"),
    (hit(ratio=10.0), "loud"),
    (hit(ratio=9.9), "quiet"),
    (hit(ratio=None), "loud"),
    (hit(level="ten", ratio=8.0), "ten"),
    (hit(level="twice", ratio=2.0), "twice"),
    (outcome(level="ten", ratio=10.0, verdict="pass", alike=True), "alike"),
    (hit(level="ten", alike=True), "ten"),
    (outcome(level="ten", quiet=True), None),
    (outcome(error="EngineError: gone"), None),
])  # fmt: skip
def test_each_outcome_counts_at_its_level(made: Outcome, level: str | None) -> None:
    assert level_of(made) == level


@given(data=st.data())
def test_every_outcome_is_counted_once_or_named(data: st.DataObject) -> None:
    models = ["qwen2", "gemma2", "mixtral"]
    keys = st.tuples(st.sampled_from(models), st.sampled_from(["loud", "ten", "twice"]))
    made = []
    for model, level in data.draw(st.lists(keys, unique=True)):
        ratio = data.draw(st.sampled_from([None, 2.0, 10.0, 1e6]))
        found = data.draw(st.booleans())
        quiet, error = data.draw(st.booleans()), data.draw(st.sampled_from(["", "EngineError: gone"]))
        fields = {
            "ratio": ratio,
            "found_by": ["modules"] if found else [],
            "quiet": quiet,
            "full": ratio,
            "error": error,
            "failed": ["modules"] if found else [],
            "alike": data.draw(st.booleans()),
        }
        made.append(hit(model=model, level=level, **fields))
    board = make_board(made)
    counted = sum((c.counts for c in board.cells), Counts())
    assert counted.tried == sum(level_of(o) is not None for o in made)
    named = [n for n in board.notes if n.what in ("missed", "faint", "alike", "quiet")]
    missed = [o for o in made if level_of(o) is not None and not o.found_by]
    assert len([n for n in named if n.what != "quiet" or n.said == "not found"]) == len(missed)
    assert len([n for n in board.notes if n.what == "broken"]) == sum(bool(o.error) for o in made)
    assert board.outcomes == len(made)


def test_pairs_without_a_fault_are_counted_by_verdict() -> None:
    pairs = [
        outcome(kind="clean", model="qwen2", verdict="pass", judges={"allclose": True}),
        outcome(kind="clean", model="gemma2", verdict="inconclusive"),
        outcome(kind="clean", model="gemma3", verdict="fail", failed=["modules"]),
        outcome(kind="clean", model="llama", error="EngineError: gone"),
        outcome(kind="null", fault="null-forward", verdict="pass"),
    ]
    board = make_board(pairs)
    clean, null = board.pairs
    assert (clean.kind, clean.tried, clean.failed, clean.inconclusive) == ("clean", 3, 1, 1)
    assert (clean.judged, clean.judges) == (1, {"allclose": 1})
    assert (null.kind, null.tried, null.failed) == ("null", 1, 0)
    assert {(n.what, n.model) for n in board.notes} == {("alarm", "gemma3"), ("broken", "llama")}
    assert not board.cells


# the page


def board() -> Board:
    return make_board(
        [
            hit(),
            hit(level="ten", ratio=10.1, causes=["unknown"]),
            hit(level="twice", ratio=2.1, found_by=[], failed=["tokens"], verdict="fail"),
            hit(model="gemma2", exact=False, near=True, named="model.layers.2", wanted="model.layers.1"),
            hit(model="mixtral", found_by=[], failed=[], verdict="pass"),
            hit(model="llama", ratio=3.25, found_by=[], failed=[], verdict="pass"),
            outcome(model="llama", level="ten", quiet=True, full=None),
            outcome(model="gemma3", error="EngineError: it | died\nhere"),
            outcome(kind="clean", verdict="fail", failed=["modules"], named="model.norm"),
        ],
        planned=9,
        versions={"torch": "9.9"},
    )


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_page_names_every_miss_with_where_and_how_loud() -> None:
    page = render(board())
    missed = section(page, "Faults that were not found")
    assert "`rope-theta`" in missed
    assert "nano mixtral float32 as it is, 50 x" in missed
    assert "llama" not in missed
    assert "tokens" in section(page, "Not found at twice the floor")
    assert "model.layers.2, near" in section(page, "Faults that were placed elsewhere")
    assert "nano qwen2 float32 ten times, 10.1 x" in section(page, "Faults that were explained otherwise")
    assert "3.25 x" in section(page, "Faults that are quieter than ten times the floor")
    assert "nano llama float32 ten times" in section(page, "Faults whose strength has no number")
    assert r"EngineError: it \| died here" in section(page, "Trials that could not run")
    assert "model.norm: modules" in section(page, "False alarms")


def test_the_page_has_the_counts_behind_each_share() -> None:
    page = render(board())
    short = section(page, "In short")
    assert "| found, at ten times the noise floor or louder | all | 75.0 % (3/4; 30.1 to 95.4) |" in short
    assert "| the exact point named, of those | 95 % at least | 66.7 % (2/3;" in short
    assert "100.0 % (1/1;" in section(page, "Pairs without a fault")
    assert "Some class" in section(page, "By class of fault")
    assert "| torch | 9.9 |" in page
    assert "Not finished" not in page


def test_every_line_of_a_table_has_as_many_cells_as_its_head() -> None:
    widths: list[int] = []
    for line in [*render(board()).splitlines(), ""]:
        if line.startswith("|"):
            widths.append(line.replace(r"\|", "").count("|"))
        else:
            assert len(set(widths)) <= 1
            widths = []


def test_an_unfinished_board_says_so() -> None:
    assert "**Not finished:** 91 of 100 trials" in render(msgspec.structs.replace(board(), planned=100))


def test_an_empty_board_is_a_page_too() -> None:
    page = render(make_board([]))
    assert "none tried" in page
    assert "**Not finished" not in page


def test_the_page_is_made_of_what_lies_beside_it(tmp_path: Path) -> None:
    write_page(board(), tmp_path / "page.md")
    kept = read_board(tmp_path / "page.json")
    assert kept == board()
    assert render(kept) == (tmp_path / "page.md").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="holds no scoreboard"):
        read_board(tmp_path / "page.md")


def test_the_page_that_is_published_is_made_of_the_data_beside_it() -> None:
    page = ROOT / "docs" / "scoreboard.md"
    if not page.exists():
        pytest.skip("the board has not run yet")
    assert page.read_text(encoding="utf-8") == render(read_board(page.with_suffix(".json")))


# books


def test_a_book_that_broke_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "shard-1-of-1.jsonl"
    book = Book(path)
    for made in (hit(), hit(model="gemma2")):
        book.add(made)
    path.write_bytes(path.read_bytes()[:-20])
    assert read_outcomes(tmp_path) == [hit()]
    Book(path).add(hit(model="llama"))
    assert [o.trial.model for o in read_outcomes(tmp_path)] == ["qwen2", "llama"]


def test_of_one_trial_the_outcome_that_ran_counts(tmp_path: Path) -> None:
    Book(tmp_path / "a.jsonl").add(outcome(error="EngineError: gone"))
    assert [o.error for o in read_outcomes(tmp_path)] == ["EngineError: gone"]
    Book(tmp_path / "b.jsonl").add(hit())
    Book(tmp_path / "c.jsonl").add(outcome(error="EngineError: gone"))
    assert read_outcomes(tmp_path) == [hit()]


def test_what_is_no_outcome_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"trial": 3}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl, line 1: not an outcome"):
        read_outcomes(tmp_path)
    with pytest.raises(UsageError, match="cannot write"):
        Book(tmp_path / "a.jsonl" / "b.jsonl")
