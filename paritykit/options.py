"""The options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from paritykit.errors import UsageError

Decorator = Callable[[Any], Any]


def _file(name: str, text: str) -> Decorator:
    return click.option(name, type=click.Path(path_type=Path, dir_okay=False), help=text)


QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress, no summary; the exit code still tells.")
ENGINE_ARG = click.option(
    "--engine-arg", multiple=True, metavar="KEY=VALUE", help="Argument of the engine (repeatable)."
)
CASES = (
    click.option("--case", multiple=True, help="Case, set of cases, or len-LENGTH+NEW (repeatable; default: smoke)."),
    _file("--cases", "JSONL file, one case a line; --case then picks by id."),
    ENGINE_ARG,
)
CANDIDATE = (
    click.option("--candidate", help="Candidate engine, or package.module:factory (default: vllm)."),
    click.option("--dtype", help="The candidate's dtype (default: auto, the checkpoint's own)."),
    click.option("--tensor-parallel-size", type=int, default=1, show_default=True, help="Ranks of the candidate."),
)
FLOOR_OPTIONS = (
    click.option("--dtype", help="The twin's dtype (default: auto, the checkpoint's own)."),
    click.option("--reference-dtype", help="The truth's dtype (default: one precision above it)."),
    click.option("--no-cache", is_flag=True, help="Neither use nor keep captures of the reference."),
    click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Keep it in this JSON file."),
    click.option("--against", type=click.Path(path_type=Path, dir_okay=False), help="Kept floor to compare it with."),
    *CASES[:2],
    QUIET,
)
WEIGHTS_OPTIONS = (*CANDIDATE, ENGINE_ARG)
RUN_OPTIONS = (
    click.option("--reference", help="Reference engine (default: hf)."),
    *CANDIDATE,
    click.option("--check", multiple=True, help="Check to run (repeatable; default: those that start no engine anew)."),
    click.option("--reference-dtype", help="The reference's dtype (default: one precision above the candidate's)."),
    click.option("--no-floor", is_flag=True, help="Measure no noise floor; judge by the fallback table."),
    click.option("--no-cache", is_flag=True, help="Neither use nor keep captures of the reference."),
    click.option(
        "--reference-arg", multiple=True, metavar="KEY=VALUE", help="Argument of the reference, e.g. device=cuda."
    ),
    _file("--map", "TOML file with mapping rules."),
    click.option(
        "--local/--no-local",
        default=None,
        help="Replay every module in every case, or nothing where all passes (default: then in the shortest cases).",
    ),
    click.option("--no-explain", is_flag=True, help="Replay nothing to find culprits, and look for no causes."),
    *CASES,
)
CAPTURE_OPTIONS = (
    click.option("--dtype", default="auto", show_default=True, help="The engine's dtype."),
    click.option("--point", multiple=True, help="Pattern of points to record (repeatable; default: all)."),
    click.option("--follow", type=click.Path(path_type=Path), help="Capture whose generated tokens are fed."),
    *CASES,
    QUIET,
)
REPORT_OPTIONS = (
    _file("--jsonl", "Write the records of the run."),
    _file("--html", "Write the HTML report."),
    _file("--markdown", "Write a Markdown summary."),
    _file("--junit", "Write JUnit XML."),
    click.option("-v", "--verbose", is_flag=True, help="Also list the worst points."),
    QUIET,
)


def apply(options: Iterable[Decorator]) -> Decorator:
    """A decorator that adds ``options`` in the order given."""
    listed = list(options)

    def decorate(command: Any) -> Any:
        for option in reversed(listed):
            command = option(command)
        return command

    return decorate


def format_engine_args(arguments: Mapping[str, Any]) -> list[str]:
    """``KEY=VALUE`` words that ``parse_engine_args`` reads back.

    >>> format_engine_args({"block_size": 32, "kv": "paged", "note": "7"})
    ['block_size=32', 'kv=paged', 'note="7"']
    """
    found = []
    for key, value in arguments.items():
        plain = isinstance(value, str) and parse_engine_args([f"{key}={value}"])[key] == value
        found.append(f"{key}={value if plain else msgspec.json.encode(value).decode()}")
    return found


def parse_engine_args(pairs: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; values are JSON where they can be, text otherwise. Raises UsageError.

    >>> parse_engine_args(["block_size=32", "attention_backend=CPU_MLA"])
    {'block_size': 32, 'attention_backend': 'CPU_MLA'}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--engine-arg {pair!r} is not of the form KEY=VALUE")
        found[key] = read_value(text)
    return found


def read_value(text: str) -> Any:
    """``text`` as JSON where it can be, as Python's ``True``, ``False`` or ``None``, or as it is.

    >>> [read_value(text) for text in ("32", "true", "None", "bfloat16")]
    [32, True, None, 'bfloat16']
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
