"""A setting comes from the nearest source, and remembers which."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.config import DEFAULTS, load_config
from paritykit.errors import UnknownNameError, UsageError


def project(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_defaults(tmp_path: Path) -> None:
    project(tmp_path, "")
    config = load_config(environ={}, start=tmp_path)
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS
    assert {config.source(name) for name in DEFAULTS} == {"default"}


@pytest.mark.parametrize(("said", "variable", "in_file", "expected"), [
    ("float16", "bfloat16", "float32", ("float16", "command line")),
    (None, "bfloat16", "float32", ("bfloat16", "PARITYKIT_DTYPE")),
    (None, None, "float32", ("float32", "pyproject.toml")),
    (None, None, None, ("auto", "default")),
    ("float16", None, None, ("float16", "command line")),
])  # fmt: skip
def test_the_nearest_source_wins(
    tmp_path: Path, said: str | None, variable: str | None, in_file: str | None, expected: tuple[str, str]
) -> None:
    project(tmp_path, f"[tool.paritykit]\ndtype = '{in_file}'\n" if in_file else "[tool.other]\nx = 1\n")
    environ = {"PARITYKIT_DTYPE": variable} if variable else {}
    config = load_config({"dtype": said}, environ=environ, start=tmp_path)
    assert (config["dtype"], Path(config.source("dtype")).name) == expected


def test_the_nearest_file_wins(tmp_path: Path) -> None:
    project(tmp_path, "[tool.paritykit]\ncandidate = 'outer'\nreference = 'outer'\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    project(tmp_path / "a", "[tool.paritykit]\ncandidate = 'inner'\n")
    config = load_config(environ={}, start=tmp_path / "a" / "b")
    assert (config["candidate"], config["reference"]) == ("inner", "hf")
    assert config.source("candidate") == str(tmp_path / "a" / "pyproject.toml")


def test_values_of_every_kind(tmp_path: Path) -> None:
    project(tmp_path, "[tool.paritykit]\nmin_coverage = 1\n[tool.paritykit.tolerance]\nbfloat16 = 0.03\n")
    config = load_config(environ={"PARITYKIT_TOLERANCE": '{"float32": 1e-6}'}, start=tmp_path)
    assert config["min_coverage"] == 1
    assert config["tolerance"] == {"float32": 1e-6}
    assert load_config(environ={}, start=tmp_path)["tolerance"] == {"bfloat16": 0.03}


@pytest.mark.parametrize(("text", "error", "said"), [
    ("[tool.paritykit]\ndtyp = 'x'\n", UnknownNameError, "unknown setting in .*'dtyp'; did you mean 'dtype'"),
    ("[tool.paritykit]\ndtype = 3\n", UsageError, "setting 'dtype' .*pyproject.toml. must be a str, not 3"),
    ("[tool.paritykit]\nmin_coverage = true\n", UsageError, "must be a float, not True"),
    ("[tool.paritykit]\nmin_coverage = 'most'\n", UsageError, "must be a float, not 'most'"),
    ("[tool.paritykit]\ntolerance = 0.1\n", UsageError, "must be a dict, not 0.1"),
    ("[tool]\nparitykit = 5\n", UsageError, "tool.paritykit must be a table, not 5"),
    ("[tool.paritykit\n", UsageError, "pyproject.toml: "),
])  # fmt: skip
def test_a_bad_file_is_a_usage_error(tmp_path: Path, text: str, error: type[UsageError], said: str) -> None:
    project(tmp_path, text)
    with pytest.raises(error, match=said):
        load_config(environ={}, start=tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"pyproject\.toml: "):
        load_config(environ={}, start=tmp_path)


def test_a_file_about_something_else(tmp_path: Path) -> None:
    project(tmp_path, "tool = 'hammer'\n")
    assert load_config(environ={}, start=tmp_path).source("dtype") == "default"


@pytest.mark.parametrize(("variable", "text", "said"), [
    ("PARITYKIT_MIN_COVERAGE", "most", "PARITYKIT_MIN_COVERAGE='most' is not a float"),
    ("PARITYKIT_MIN_COVERAGE", "nan", "is not a float"),
    ("PARITYKIT_MIN_COVERAGE", "true", "must be a float, not True"),
    ("PARITYKIT_TOLERANCE", "0.1", "must be a dict, not 0.1"),
])  # fmt: skip
def test_a_bad_variable_is_a_usage_error(tmp_path: Path, variable: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_config(environ={variable: text}, start=project(tmp_path, ""))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(environ=st.dictionaries(st.sampled_from([f"PARITYKIT_{name.upper()}" for name in DEFAULTS]), TEXTS))
def test_any_environment_gives_settings_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, environ: dict[str, str]
) -> None:
    start = project(tmp_path_factory.getbasetemp(), "")
    try:
        config = load_config(environ=environ, start=start)
    except UsageError as error:
        named = [name for name in environ if name in str(error)]
    else:
        named = [config.source(name) for name in DEFAULTS if config.source(name) != "default"]
        assert set(named) == set(environ)
    assert bool(named) == bool(environ)
