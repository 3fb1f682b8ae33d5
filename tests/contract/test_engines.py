"""What every engine owes: the protocol, the same capture for the same tokens, new folders only, a clean end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.engines import ENGINES, engine
from paritykit.engines.base import CAPABILITIES, Engine
from paritykit.testing import tiny_model

CASES = [pk.Case(id="a", tokens=(5, 6, 7), new_tokens=3), pk.Case(id="b", tokens=(9, 498), batch=1)]


@pytest.fixture(scope="module", params=ENGINES.names())
def opened(request: pytest.FixtureRequest) -> Iterator[Any]:
    model = tiny_model("qwen2", num_hidden_layers=2)
    if request.param == "module":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        made = engine("module", model=loaded)
    else:
        made = engine(request.param, str(model), dtype="float32")
    made.open()
    yield made
    made.close()
    made.close()


def test_it_is_an_engine(opened: Any) -> None:
    assert isinstance(opened, Engine)
    assert opened.capabilities <= CAPABILITIES.keys()
    side = opened.describe()
    assert side.engine
    assert side.dtype == "float32"
    assert side.versions


def test_same_tokens_same_capture(opened: Any, tmp_path: Path) -> None:
    first, second = (opened.run(CASES, points=Selection(), out=tmp_path / name) for name in ("first", "second"))
    assert list(first.points) == list(second.points)
    assert first.manifest.generated == second.manifest.generated
    assert len(first.generated("a")) == 3
    assert first.generated("b") == []
    for key in first.points:
        for case in ("a", "b"):
            torch.testing.assert_close(first.rows(key, case), second.rows(key, case), rtol=0, atol=0)
    assert first.rows("#logits", "a").shape == (5, 499)
    assert first.rows("#logits", "b").shape == (2, 499)


def test_what_the_cache_held_before_does_not_matter(opened: Any, tmp_path: Path) -> None:
    if "poison" not in opened.capabilities:
        pytest.skip("this engine does not let its cache be filled")
    clean = opened.run(CASES, points=Selection(), out=tmp_path / "clean")
    opened.poison_cache(3e4)
    poisoned = opened.run(CASES, points=Selection(), out=tmp_path / "poisoned")
    for key in clean.points:
        torch.testing.assert_close(clean.rows(key, "a"), poisoned.rows(key, "a"), rtol=0, atol=0)


def test_selection_is_kept_to(opened: Any, tmp_path: Path) -> None:
    capture = opened.run(CASES, points=Selection(["*.input_layernorm"]), out=tmp_path / "some")
    assert list(capture.points) == ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"]
    empty = opened.run(CASES, points=Selection(()), out=tmp_path / "none")
    assert not empty.points
    assert len(empty.generated("a")) == 3


def test_a_folder_that_exists_is_left_alone(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(pk.UsageError, match="exists already"):
        opened.run(CASES, points=Selection(), out=tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert opened.run(CASES, points=Selection(()), out=tmp_path / "again").generated("a")
