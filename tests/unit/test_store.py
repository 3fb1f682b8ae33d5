"""Reference captures are kept by what they were made from: another of anything is another capture."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.captures.manifest import MANIFEST, Segment
from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.store import Store, key_of, open_store
from tests.made import write_capture

CASE = Case(id="a", tokens=(1, 2), new_tokens=1)
KEY = key_of("hf", {"dtype": "float32"}, digest="d", cases=[CASE])


class Maker:
    """Makes a capture, and counts how often."""

    def __init__(self) -> None:
        self.made: list[Path] = []

    def __call__(self, out: Path) -> Capture:
        self.made.append(out)
        return write_capture(out, [([Segment(0, 0, 2)], {"x": torch.ones(2, 3)})], cases=[CASE])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "kept")


def test_what_is_there_is_not_made_again(store: Store, tmp_path: Path) -> None:
    make = Maker()
    first, second = (store.take(KEY, make, scratch=tmp_path / "scratch", read=Capture.open) for _ in range(2))
    assert first.path == second.path == store.folder / KEY
    assert len(make.made) == 1
    assert torch.equal(second.rows("x", "a"), torch.ones(2, 3))
    assert [p.name for p in store.folder.iterdir()] == [KEY]


def test_what_is_damaged_is_made_again(store: Store, tmp_path: Path) -> None:
    make = Maker()
    kept = store.take(KEY, make, scratch=tmp_path / "scratch", read=Capture.open).path
    (kept / MANIFEST).write_text("{}")
    assert store.find(KEY, Capture.open) is None
    assert not kept.exists()
    store.take(KEY, make, scratch=tmp_path / "scratch", read=Capture.open)
    assert len(make.made) == 2


def test_what_fails_leaves_nothing(store: Store, tmp_path: Path) -> None:
    def fail(out: Path) -> Capture:
        Maker()(out)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.take(KEY, fail, scratch=tmp_path / "scratch", read=Capture.open)
    assert list(store.folder.iterdir()) == []


def test_two_at_once_both_get_it(store: Store, tmp_path: Path) -> None:
    make, gate = Maker(), threading.Barrier(2)
    found: list[Capture] = []

    def slow(out: Path) -> Capture:
        gate.wait(20)
        return make(out)

    both = [
        threading.Thread(target=lambda: found.append(store.take(KEY, slow, scratch=tmp_path, read=Capture.open)))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert [c.path for c in found] == [store.folder / KEY] * 2
    assert [p.name for p in store.folder.iterdir()] == [KEY]


def test_a_store_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make = Maker()
    found = Store(tmp_path / "file" / "kept").take(KEY, make, scratch=tmp_path / "scratch", read=Capture.open)
    assert found.path == tmp_path / "scratch"


OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"arguments": {"dtype": "float64"}},
    "argument": {"arguments": {"dtype": "float32", "padding": "left"}},
    "weights": {"digest": "e"},
    "tokens": {"cases": [Case(id="a", tokens=(1, 3), new_tokens=1)]},
    "forced": {"cases": [CASE.force([4])]},
    "more": {"cases": [CASE, Case(id="b", tokens=(1,))]},
    "engine": {"engine": "other"},
}


def key(**changed: Any) -> str:
    parts: dict[str, Any] = {
        "engine": "hf",
        "arguments": {"dtype": "float32"},
        "digest": "d",
        "cases": [CASE],
        **changed,
    }
    return key_of(parts.pop("engine"), parts.pop("arguments"), **parts)


def test_the_name_is_made_of_everything_that_matters() -> None:
    keys = [key(), *(key(**changed) for changed in OTHERS.values())]
    assert len(set(keys)) == len(keys)
    assert key() == KEY == key(arguments={"dtype": "float32"})


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_other_versions_are_other_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paritykit.store.version", lambda asked: "0" if asked == name else "1")
    one = key()
    monkeypatch.setattr("paritykit.store.version", lambda asked: "1")
    assert key() != one


def test_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store("off") is None
    found = open_store(str(tmp_path / "mine"))
    assert found is not None
    assert found.folder == tmp_path / "mine"
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda *_, **__: tmp_path / "assets")
    auto = open_store("auto")
    assert auto is not None
    assert auto.folder == tmp_path / "assets"
