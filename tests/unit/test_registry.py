"""Names to values: registered here, by dotted path, or by another package's entry point."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.errors import UnknownNameError, UsageError
from paritykit.registry import Registry, load_attribute


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package that adds two engines by entry point; its module counts how often it was imported."""
    (tmp_path / "other_engines.py").write_text("class Fast: pass\nhf = 'not the one that ships'\n")
    info = tmp_path / "other_engines-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engines\nVersion: 1.0\n")
    points = "[paritykit.engines]\nfast = other_engines:Fast\nhf = other_engines:hf\ngone = other_engines:Gone\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "other_engines"
    sys.modules.pop("other_engines", None)


def test_entry_points_are_listed_without_importing_them(other_package: str) -> None:
    engines: Registry[object] = Registry("engine")
    engines.register("hf", 1)
    assert engines.names() == ["hf", "fast", "gone"]
    assert other_package not in sys.modules
    assert getattr(engines.get("fast"), "__name__", "") == "Fast"
    assert engines.get("fast") is engines.get("fast")


def test_what_ships_wins_over_an_entry_point(other_package: str) -> None:
    engines: Registry[int] = Registry("engine")
    engines.register("hf", 1)
    assert engines.get("hf") == 1


def test_a_broken_entry_point_is_a_usage_error(other_package: str) -> None:
    engines: Registry[object] = Registry("engine")
    with pytest.raises(
        UsageError, match="engine 'gone', entry point 'other_engines:Gone': module 'other_engines' has no"
    ):
        engines.get("gone")


def test_a_dotted_path_is_imported_on_first_use() -> None:
    codecs: Registry[object] = Registry("codec")
    codecs.register("path", "os.path:join")
    codecs.register("missing", "no_such_package:thing")
    assert codecs.names() == ["path", "missing"]
    assert codecs.get("path") is load_attribute("os.path:join")
    with pytest.raises(UsageError, match="codec 'no_such_package:thing': No module named 'no_such_package'"):
        codecs.get("missing")


@pytest.mark.parametrize(("target", "said"), [
    ("json", "is not of the form 'package.module:attribute'"),
    (":dumps", "is not of the form"),
    ("json:", "is not of the form"),
    ("json:nothing", "module 'json' has no attribute 'nothing'"),
    ("json:decoder.nothing", "has no attribute 'nothing'"),
    (".relative:thing", "is not of the form"),
])  # fmt: skip
def test_bad_targets_are_usage_errors(target: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_attribute(target)


def test_a_second_value_is_refused_but_the_same_one_is_not() -> None:
    numbers: Registry[str] = Registry("number")
    numbers.register("pi", "math:pi")
    numbers.register("pi", "".join(["math", ":pi"]))
    numbers.get("pi")
    with pytest.raises(UsageError, match="number 'pi' is registered twice"):
        numbers.register("pi", "math:tau")


def test_a_miss_names_the_nearest() -> None:
    engines: Registry[int] = Registry("engine_kind")
    engines.register("vllm", 1)
    engines.register("hf", 2)
    with pytest.raises(UnknownNameError, match=r"unknown engine_kind 'vlm'; did you mean 'vllm'\? \(have: hf, vllm\)"):
        engines.get("vlm")


@given(st.dictionaries(st.text(), st.integers(), max_size=8))
def test_registered_values_come_back_in_order(values: dict[str, int]) -> None:
    numbers: Registry[int] = Registry("number")
    for name, value in values.items():
        numbers.register(name, value)
    assert list(numbers.items()) == list(values.items())


@given(st.lists(st.text(min_size=1), max_size=30), st.text(min_size=1))
def test_any_unknown_name_reads_as_one(known: list[str], name: str) -> None:
    message = str(UnknownNameError("thing", name, known))
    assert message.startswith(f"unknown thing {name!r}")
    assert ("none" in message) if not known else ("have: " in message)
