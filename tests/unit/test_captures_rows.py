"""Rows are found by (case, position), however the engine split its work into steps and batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.comparison.align import pairs, positions
from paritykit.errors import CaptureFormatError
from paritykit.mapping.rules import Block, Rule
from tests.made import Step, write_capture

WIDTH = 3


def truth(case: int, position: int) -> list[float]:
    return [float(case), float(position), float(1000 * case + position)]


def rows(case: int, start: int, stop: int) -> torch.Tensor:
    return torch.tensor([truth(case, p) for p in range(start, stop)]).reshape(-1, WIDTH)


def step_of(parts: list[Segment], *, junk: bool = False) -> Step:
    tensor = torch.cat([rows(s.case, s.start, s.start + s.length) for s in parts])
    return parts, {"m": torch.full_like(tensor, -1.0) if junk else tensor}


@st.composite
def schedules(draw: st.DrawFn, lengths: list[int]) -> list[Step]:
    """Chunks of every case in order of position, cases mixed into steps at will, some positions computed again."""
    done = [0] * len(lengths)
    steps: list[Step] = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        open_cases = [i for i, n in enumerate(lengths) if done[i] < n]
        chosen = draw(st.lists(st.sampled_from(open_cases), min_size=1, unique=True))
        parts = []
        for case in chosen:
            back = draw(st.integers(0, min(2, done[case])))
            start = done[case] - back
            stop = draw(st.integers(done[case] + 1, lengths[case]))
            parts.append(Segment(case, start, stop - start))
            done[case] = stop
        if draw(st.booleans()):
            steps.append(step_of(parts, junk=True))
        steps.append(step_of(parts))
        if draw(st.booleans()):
            steps.append(step_of([inner(draw, case, done[case]) for case in chosen]))
    return steps


def inner(draw: st.DrawFn, case: int, done: int) -> Segment:
    """Some positions that were computed before, anywhere among them."""
    start = draw(st.integers(0, done - 1))
    return Segment(case, start, draw(st.integers(1, done - start)))


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=3)


def capture_of(folder: Path, lengths: list[int], *ranks: list[Step]) -> Capture:
    return write_capture(folder, *ranks, cases=[Case(id=f"c{i}", tokens=(1,) * n) for i, n in enumerate(lengths)])


@given(st.data(), LENGTHS)
@settings(deadline=None, max_examples=80)
def test_any_schedule_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, lengths: list[int]
) -> None:
    capture = capture_of(tmp_path_factory.mktemp("rows") / "c", lengths, data.draw(schedules(lengths)))
    for case, length in enumerate(lengths):
        assert torch.equal(capture.rows("m", f"c{case}"), rows(case, 0, length))
        assert positions(capture, capture.point("m"), f"c{case}") == length
        spans = capture.spans(capture.point("m"), f"c{case}")
        assert [s.position + n for s in spans for n in range(s.length)] == list(range(length))


@given(st.data(), LENGTHS)
@settings(deadline=None, max_examples=80)
def test_any_two_schedules_are_paired_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, lengths: list[int]
) -> None:
    """Two ranks of the candidate have schedules of their own; the second case of one side may be cut short."""
    folder = tmp_path_factory.mktemp("pairs")
    cut = [data.draw(st.integers(0, n)) for n in lengths]
    ours = capture_of(folder / "r", lengths, data.draw(schedules(lengths)))
    ranks = [data.draw(schedules(cut)) for _ in range(2)]
    theirs = capture_of(folder / "c", lengths, *ranks)
    if any(cut):
        rule = Rule(reference="m", candidate="m", blocks=(Block(1, 0, 1), Block(0, 1, 1), Block(1, 2, 1)))
        for case, length in enumerate(cut):
            found = list(pairs(rule, ours, theirs, f"c{case}"))
            assert [p for start, left, _ in found for p in range(start, start + len(left))] == list(range(length))
            for start, left, right in found:
                assert torch.equal(left, rows(case, start, start + len(left)))
                assert torch.equal(right, left)


def test_one_row_that_differs_is_seen_in_its_place(tmp_path: Path) -> None:
    parts = [Segment(0, 0, 5), Segment(1, 0, 4)]
    labels, tensors = step_of(parts)
    wrong = tensors["m"].clone()
    wrong[5 + 2] += 1
    ours = capture_of(tmp_path / "r", [5, 4], [step_of([Segment(1, 0, 4)]), step_of([Segment(0, 0, 5)])])
    theirs = capture_of(tmp_path / "c", [5, 4], [(labels, {"m": wrong})])
    rule = Rule(reference="m", candidate="m")
    different = {
        (case, start + int(row))
        for case in ("c0", "c1")
        for start, left, right in pairs(rule, ours, theirs, case)
        for row in (left != right).any(1).nonzero()
    }
    assert different == {("c1", 2)}


def test_a_rank_that_lacks_rows_is_named(tmp_path: Path) -> None:
    ours = capture_of(tmp_path / "r", [4], [step_of([Segment(0, 0, 4)])])
    theirs = capture_of(tmp_path / "c", [4], [step_of([Segment(0, 0, 4)])], [step_of([Segment(0, 0, 3)])])
    rule = Rule(reference="m", candidate="m", blocks=(Block(0, 0, 1), Block(1, 1, 2)))
    with pytest.raises(CaptureFormatError, match="m on rank 1 lacks some of the positions 0 to 3 of case 'c0'"):
        list(pairs(rule, ours, theirs, "c0"))


def test_nothing_is_copied_where_rows_lie_together(tmp_path: Path) -> None:
    capture = capture_of(tmp_path / "c", [5], [step_of([Segment(0, 0, 5)])])
    (_, left, right), *more = pairs(Rule(reference="m", candidate="m"), capture, capture, "c0")
    assert not more
    assert left.data_ptr() == right.data_ptr()
