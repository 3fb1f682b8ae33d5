"""How to see a failure again: one command, and two lines of Python that do the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import pairwise

from paritykit.options import parse_engine_args
from paritykit.reports.wording import first_finding
from paritykit.results import Results

_REPORTS = {"--jsonl", "--html", "--markdown", "--junit"}
_SINGLE = {
    "--candidate": "candidate",
    "--reference": "reference",
    "--dtype": "dtype",
    "--reference-dtype": "reference_dtype",
    "--map": "map_file",
}


def repro(results: Results) -> str:
    """The run's command, narrowed to the check and case of the first divergence where it is ``paritykit run``.

    An engine that differs from itself may do so only beside other cases: these stay.
    """
    command, first = results.run.command, results.summary.first_divergence
    words = shlex.split(command) if command.startswith("paritykit run ") else []
    if first is None or not words:
        return command
    found = first_finding(results)
    if found is not None and found.condition:
        cases = found.workload or list(_values(words, "--case"))
    else:
        cases = [first.case] if first.case else []
    kept = _without(words, {*_REPORTS, "--check", "--case"})
    return shlex.join([*kept, "--check", first.check, *(w for c in cases for w in ("--case", c))])


def script(results: Results) -> str:
    """``repro`` as an import and a call; empty where it is no ``paritykit run``, or one that names a file of cases."""
    command = repro(results)
    if results.summary.first_divergence is None or not command.startswith("paritykit run "):
        return ""
    words = shlex.split(command)
    if "--cases" in words:
        return ""
    checks, cases = list(_values(words, "--check")), list(_values(words, "--case"))
    given = {name: value for option, name in _SINGLE.items() for value in _values(words, option)}
    told = [repr(words[2]), *(f"{name}={value!r}" for name, value in given.items())]
    told += [f"tensor_parallel_size={value}" for value in _values(words, "--tensor-parallel-size")]
    told += [f"{name}=False" for name in ("floor", "explain") if f"--no-{name}" in words]
    told += [f"local={on}" for option, on in (("--local", True), ("--no-local", False)) if option in words]
    for option, name in (("--engine-arg", "engine_args"), ("--reference-arg", "reference_args")):
        arguments = parse_engine_args(tuple(_values(words, option)))
        told += [f"{name}={arguments!r}"] if arguments else []
    told += [f"checks={checks!r}"] if checks else []
    told += [f"cases=pk.cases({', '.join(map(repr, cases))})"] if cases else []
    return f"import paritykit as pk\npk.run({', '.join(told)}).raise_on_failure()"


def _values(words: list[str], option: str) -> Iterator[str]:
    """The values of ``option``, given as a word of their own or after an equals sign."""
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name == option:
            yield value if equals else following


def _without(words: list[str], options: set[str]) -> Iterator[str]:
    """``words`` without ``options`` and their values."""
    skip = False
    for word in words:
        if skip or word.partition("=")[0] in options:
            skip = not skip and word in options
        else:
            yield word
