"""Settings: command line over environment over ``[tool.paritykit]`` over default; each value remembers its source."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from paritykit.errors import UnknownNameError, UsageError

DEFAULTS: dict[str, Any] = {
    "reference": "hf",
    "candidate": "vllm",
    "dtype": "auto",
    "reference_dtype": "auto",
    "min_coverage": 0.9,
    "floor": True,
    "tolerance": {},
    "policy": [],
    "cache": "auto",
    "allow": [],
}
"""Every setting there is. ``reference_dtype`` is one precision above the candidate's unless said otherwise; ``floor``
measures the noise floor by a second run of the reference. ``tolerance`` is a number in its place, by dtype:
``{"bfloat16": 0.03}``; ``policy`` lists allowed numbers by point: ``{point = "*.mlp", factor = 3.0, reason = "..."}``.
``cache`` keeps captures of the reference: under the Hugging Face cache, in a folder, or ``off``. ``allow`` lists what
may be wrong with weights: ``{problem = "offset", name = ".*norm.weight", reason = "stored without the 1"}``."""


class Value(msgspec.Struct, frozen=True):
    """A setting and where it came from: ``command line``, ``PARITYKIT_DTYPE``, a file name, or ``default``."""

    value: Any
    source: str


class Config(msgspec.Struct, frozen=True):
    """All settings of one run."""

    values: dict[str, Value]

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value

    def source(self, name: str) -> str:
        """Where the value of ``name`` came from."""
        return self.values[name].source


def load_config(
    given: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    start: Path | None = None,
) -> Config:
    """Resolve every setting. ``given`` holds the command line's (None where not said).

    Raises UsageError for a broken pyproject.toml or a value of the wrong kind, UnknownNameError for a wrong key.
    """
    environ = os.environ if environ is None else environ
    table, source = _pyproject(start or Path.cwd())
    values: dict[str, Value] = {}
    for name, default in DEFAULTS.items():
        variable = f"PARITYKIT_{name.upper()}"
        said = (given or {}).get(name)
        if said is not None:
            value = Value(said, "command line")
        elif variable in environ:
            value = Value(_parse(environ[variable], default, variable), variable)
        elif name in table:
            value = Value(table[name], source)
        else:
            value = Value(default, "default")
        values[name] = _checked(name, value, default)
    return Config(values)


def _parse(text: str, default: Any, variable: str) -> Any:
    if isinstance(default, str):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{variable}={text!r} is not a {type(default).__name__}: {error}") from error


def _checked(name: str, value: Value, default: Any) -> Value:
    wanted = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value.value, wanted) or isinstance(value.value, bool) != isinstance(default, bool):
        raise UsageError(f"setting {name!r} ({value.source}) must be a {type(default).__name__}, not {value.value!r}")
    return value


def _pyproject(start: Path) -> tuple[dict[str, Any], str]:
    """The ``[tool.paritykit]`` table of the nearest pyproject.toml at or above ``start``, and the file's name."""
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
            except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UsageError(f"{path}: {error}") from error
            table = tools.get("paritykit", {}) if isinstance(tools, dict) else {}
            if not isinstance(table, dict):
                raise UsageError(f"{path}: tool.paritykit must be a table, not {table!r}")
            unknown = next((key for key in table if key not in DEFAULTS), None)
            if unknown is not None:
                raise UnknownNameError(f"setting in [tool.paritykit] of {path}", unknown, DEFAULTS)
            return table, str(path)
    return {}, ""
