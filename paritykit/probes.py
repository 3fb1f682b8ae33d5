"""Does a library import here? Asked in a process of its own, so that a broken one cannot harm the one who asks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

Outcome = Literal["absent", "works", "broken", "timeout"]
ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Warning)\b.*")

# `-P` keeps the current folder off sys.path: a folder called "torch" there must not pass for the library.
SCRIPT = """
import importlib.metadata, importlib.util, json, sys
name = sys.argv[1]
spec = importlib.util.find_spec(name)
answer = {"installed": spec is not None}
if spec is not None:
    owners = [d for d in (name, name + "-cpu") if list(importlib.metadata.Distribution.discover(name=d))]
    answer["distribution"] = owners[0] if owners else ""
    answer["version"] = importlib.metadata.version(owners[0]) if owners else ""
    answer["origin"] = spec.origin or ""
print("\\n" + json.dumps(answer), flush=True)
if spec is not None:
    facts = {}
    exec(sys.argv[2])
    print("\\n" + json.dumps({**answer, "facts": facts}), flush=True)
"""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one import.

    ``distribution`` is the name that pip knows the library by, empty where pip does not know it; ``origin`` the file it
    was found in; ``facts`` what the probe asked of it; ``error`` why it does not import.
    """

    name: str
    outcome: Outcome
    distribution: str = ""
    version: str = ""
    origin: str = ""
    error: str = ""
    facts: dict[str, str] = {}


class _Answer(msgspec.Struct):
    installed: bool = False
    distribution: str = ""
    version: str = ""
    origin: str = ""
    facts: dict[str, str] = {}


def probe(name: str, statements: str, *, python: str = sys.executable, timeout: float = 180) -> Probe:
    """Run ``statements`` where library ``name`` is installed, in a fresh ``python``; ``timeout`` in seconds.

    The statements import what they need and may put strings into ``facts``.

    >>> probe("json", "import json").outcome
    'works'
    """
    command = [python, "-P", "-c", SCRIPT, name, statements]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            return _report(name, _last_answer(out), outcome="timeout", error=f"no answer within {timeout:.0f} s")
    answer = _last_answer(out)
    if process.returncode != 0:
        return _report(name, answer, outcome="broken", error=_reason(err.decode(errors="replace"), process.returncode))
    return _report(name, answer, outcome="works" if answer.installed else "absent")


def probe_all(wanted: Mapping[str, str], *, python: str = sys.executable, timeout: float = 180) -> dict[str, Probe]:
    """One probe for each library, side by side, in the order given."""
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        started = {
            name: pool.submit(probe, name, text, python=python, timeout=timeout) for name, text in wanted.items()
        }
        return {name: future.result() for name, future in started.items()}


def _report(name: str, answer: _Answer, *, outcome: Outcome, error: str = "") -> Probe:
    return Probe(
        name=name,
        outcome=outcome,
        distribution=answer.distribution,
        version=answer.version,
        origin=answer.origin,
        facts=answer.facts,
        error=error,
    )


def _last_answer(out: bytes) -> _Answer:
    """The last line that is an answer: libraries may print lines of their own while they are imported."""
    for line in reversed(out.splitlines()):
        try:
            return msgspec.json.decode(line, type=_Answer)
        except msgspec.MsgspecError:
            continue
    return _Answer()


def _reason(stderr: str, returncode: int) -> str:
    """The error that ended the import and, where another one caused it, that one."""
    if returncode < 0:
        return f"the import was killed by {signal.Signals(-returncode).name}"
    lines = [line.strip() for line in stderr.splitlines()]
    errors = list(dict.fromkeys(line for line in lines if ERROR_LINE.fullmatch(line)))
    if not errors:
        return next((line for line in reversed(lines) if line), f"the import ended with exit code {returncode}")
    return errors[-1] if len(errors) == 1 else f"{errors[-1]} (caused by {errors[0]})"
