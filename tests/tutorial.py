"""A page of documentation as a reader follows it: its files, its edits, its commands and what they print.

A fence ``python title="f.py"`` is a file, ``diff title="f.py"`` an edit of one, ``console`` commands with their output.
In an output a line ``...`` stands for any lines and ``...`` within a line for any text. Numbers that were measured or
counted may differ; names, slices, verdicts and words may not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
FIGURE = re.compile(r"(?<![\w.:\[#/{-])-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w:\]}])")
"""A number by itself: no part of a name (``layers.0``, ``float32``) or of a slice (``[0:128]``)."""
GAP = "..."


class Block(NamedTuple):
    """One fence of a page."""

    kind: str
    title: str
    text: str


class Command(NamedTuple):
    """A command and the lines it is shown to print."""

    line: str
    shown: list[str]


def read_blocks(page: Path) -> list[Block]:
    """The fences of a page, in order."""
    return [Block(*found) for found in FENCE.findall(page.read_text())]


def read_commands(text: str) -> list[Command]:
    """The commands of a console block. Raises ValueError for output without one."""
    found: list[Command] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], []))
        elif not found:
            raise ValueError(f"output before any command: {line}")
        else:
            found[-1].shown.append(line)
    return found


def edit(before: str, diff: str) -> str:
    """``before`` with the lines of ``diff`` replaced. Raises ValueError unless its old lines are there exactly once."""
    lines = diff.splitlines()
    old = "".join(f"{x[1:]}\n" for x in lines if not x.startswith("+"))
    new = "".join(f"{x[1:]}\n" for x in lines if not x.startswith("-"))
    if before.count(old) != 1:
        raise ValueError(f"these lines are in the file {before.count(old)} times:\n{old}")
    return before.replace(old, new)


def difference(shown: list[str], printed: str) -> str:
    """Where what is shown is not what was printed: the first line that does not fit; empty if all does."""
    real = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    if re.fullmatch(_pattern(shown), real):
        return ""
    fits = next(n for n in range(len(shown), -1, -1) if re.match(_pattern(shown[:n]), real))
    line = shown[fits] if fits < len(shown) else "(end of the output)"
    return f"line {fits + 1} is not what is printed:\n{line}\nprinted was:\n{real}"


def _pattern(shown: list[str]) -> str:
    return "".join(r"(?:.*\n)*?" if line.strip() == GAP else _line(line) + r"\n" for line in shown)


def _line(text: str) -> str:
    texts = [re.escape(part).replace(re.escape(GAP), ".*") for part in FIGURE.split(text.rstrip())]
    return FIGURE.pattern.join(texts)
