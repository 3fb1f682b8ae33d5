"""A kept noise floor: what it holds, when it has moved, and what it cannot be compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.errors import UsageError
from paritykit.floor_file import MOVED, FloorFile, floor_of, moves, read_floor, write_floor
from tests.made import write_capture

CASES = [Case(id="a", tokens=(1, 2, 3)), Case(id="b", tokens=(4,))]


def capture(folder: Path, name: str, *, error: float = 0.0, dtype: str = "float32", **more: torch.Tensor) -> Capture:
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(4, 8, generator=generator) for n in ("embed", "mlp")}
    tensors["mlp"] *= 1 + error
    steps = [([Segment(0, 0, 3), Segment(1, 0, 1)], {**tensors, **more})]
    return write_capture(folder / name, steps, cases=CASES, dtype=dtype)


@pytest.fixture
def measured(tmp_path: Path) -> FloorFile:
    truth = capture(tmp_path, "truth", extra=torch.ones(4, 2))
    return floor_of(truth, capture(tmp_path, "twin", error=0.01, dtype="bfloat16"))


def test_it_holds_each_point_of_both_and_where_it_comes_from(measured: FloorFile) -> None:
    assert list(measured.floors) == ["embed", "mlp"]
    assert measured.floors["embed"] == {"a": 0.0, "b": 0.0}
    assert measured.floors["mlp"] == pytest.approx({"a": 0.01, "b": 0.01}, rel=1e-3)
    assert (measured.truth.dtype, measured.twin.dtype) == ("float32", "bfloat16")
    assert set(measured.cases) == {"a", "b"}


def test_it_is_kept_as_lines_and_read_again(measured: FloorFile, tmp_path: Path) -> None:
    write_floor(measured, tmp_path / "references" / "x.json")
    assert read_floor(tmp_path / "references" / "x.json") == measured
    assert '"a": 0.0' in (tmp_path / "references" / "x.json").read_text()
    assert moves(measured, measured) == []


def times(floor: FloorFile, factor: float) -> FloorFile:
    changed = {**floor.floors, "mlp": {**floor.floors["mlp"], "b": floor.floors["mlp"]["b"] * factor}}
    return msgspec.structs.replace(floor, floors=changed)


@pytest.mark.parametrize(("factor", "moved"), [(MOVED * 1.01, True), (MOVED * 0.99, False), (1 / MOVED / 1.01, True)])
def test_a_floor_that_moves_is_told(measured: FloorFile, factor: float, moved: bool) -> None:
    found = moves(measured, times(measured, factor))
    assert [(m.point, m.case) for m in found] == [("mlp", "b")] * moved
    assert all("1.00e-02 -> " in m.describe() for m in found)


def test_noise_where_there_was_none_and_points_that_come_and_go(measured: FloorFile) -> None:
    noisy = msgspec.structs.replace(measured, floors={**measured.floors, "embed": {"a": 1e-9, "b": 0.0}})
    assert [(m.point, m.case) for m in moves(measured, noisy)] == [("embed", "a")]
    fewer = msgspec.structs.replace(measured, floors={"mlp": measured.floors["mlp"]})
    assert [m.describe() for m in moves(measured, fewer)] == ["embed / a: 0.00e+00 -> -", "embed / b: 0.00e+00 -> -"]
    assert [m.before for m in moves(fewer, measured)] == [None, None]


@pytest.mark.parametrize(("change", "what"), [
    ({"cases": {"a": "other"}}, "cases"),
    ({"digest": "other"}, "weights"),
    ({"dtype": "float16"}, "dtypes"),
])  # fmt: skip
def test_floors_of_different_things_are_not_compared(measured: FloorFile, change: dict[str, Any], what: str) -> None:
    side = "twin" if "dtype" in change else "truth"
    fields = change if "cases" in change else {side: msgspec.structs.replace(getattr(measured, side), **change)}
    with pytest.raises(UsageError, match=f"of other {what}: "):
        moves(measured, msgspec.structs.replace(measured, **fields))


@pytest.mark.parametrize(("text", "said"), [
    (None, "cannot read"), ("{}", "is not a noise floor"), ("nonsense", "is not a noise floor"),
])  # fmt: skip
def test_a_file_that_is_none(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_floor(tmp_path / "x.json")


def test_a_newer_file(measured: FloorFile, tmp_path: Path) -> None:
    write_floor(msgspec.structs.replace(measured, schema=2), tmp_path / "x.json")
    with pytest.raises(UsageError, match="schema 2, but this ParityKit reads schema 1"):
        read_floor(tmp_path / "x.json")
