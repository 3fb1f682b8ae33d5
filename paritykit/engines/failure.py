"""Telling a user what made an engine fail: the place in their own code, the likely cause, and where the whole log is.

What is read is the text that Python prints of an error: a rank of vLLM fails in a process of its own, and only that
text comes back. Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import re
import sysconfig
import tempfile
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import NamedTuple

import paritykit

LIBRARIES = ("accelerate", "huggingface_hub", "numpy", "safetensors", "torch", "transformers", "triton", "vllm")
"""Packages that are not the user's, wherever they are installed; nor is what these need."""
NEEDED = re.compile(r"^[\w.-]+")
"""The distribution that a requirement begins with."""
FRAME = re.compile(r'^(?P<lead>.*?)File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+?)\s*$')
BEGIN = "Traceback (most recent call last):"
ADDED = re.compile(r"\n  (?:at|likely:|whole log:) ")
"""Where lines begin that are added to an engine's error."""
KEPT = 20
"""Logs that stay: older ones are removed."""
CRASHED, CUT = 5, 200
"""Frames of a crash that are shown, and characters of each: those of C++ have long names."""
CAUSES = (
    (
        re.compile(r"must be Tensor, not tuple|'tuple' object has no attribute|can't multiply sequence|"
                   r"unsupported operand type\(s\) for .*'tuple'"),
        "",
        "a tuple is used as a tensor: vLLM's linear layers return (output, bias), so take the first",
    ),
    (
        re.compile(r"\bKeyError\b"),
        "load_weights|^load",
        "the loader asks for a parameter that the model does not have: rename it, or skip what is not used",
    ),
)  # fmt: skip
"""What an error's text, and the name of the function that it came from, make likely."""


class Frame(NamedTuple):
    """One line of a traceback, with the code at it."""

    file: str
    line: int
    function: str
    code: str

    @property
    def own(self) -> bool:
        """Whether it is the user's: of no library that is known, nor of Python or ParityKit itself."""
        path = Path(self.file)
        if self.file.startswith("<") or path.is_relative_to(Path(paritykit.__file__).parent):
            return False
        parts = path.parts
        installed = [n for n, part in enumerate(parts[:-1]) if part in ("site-packages", "dist-packages")]
        if installed:
            return parts[installed[-1] + 1].removesuffix(".py") not in libraries()
        return not any(path.is_relative_to(root) for root in (sysconfig.get_path("stdlib"),))


@cache
def libraries() -> frozenset[str]:
    """``LIBRARIES`` and the packages that they need, where these are installed, by the names they import as."""
    provided = packages_distributions()
    left = [d for name in LIBRARIES for d in provided.get(name, ())]
    found: set[str] = set()
    while left:
        name = _normal(left.pop())
        if name not in found:
            found.add(name)
            with contextlib.suppress(PackageNotFoundError):
                left += [m[0] for r in requires(name) or () if "extra ==" not in r and (m := NEEDED.match(r))]
    needed = {top for top, sources in provided.items() if any(_normal(d) in found for d in sources)}
    return frozenset(needed) | frozenset(LIBRARIES)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def explain(log: str, *, message: str) -> str:
    """The innermost frame of the user's code in a log, with the likely cause; empty for none of both."""
    found = [frames for block in log.split(BEGIN)[1:] if (frames := _frames(block)) and any(f.own for f in frames)]
    place = next((f for f in reversed(found[-1]) if f.own), None) if found else None
    last = _last_error(log) or message
    lines = []
    if place is not None:
        code = f": {place.code}" if place.code else ""
        lines.append(f"  at {place.file}:{place.line} in {place.function}{code}")
    for pattern, within, told in CAUSES:
        inside = place is not None and re.search(within, place.function)
        if any(pattern.search(text) for text in (last, message)) and inside:
            lines.append(f"  likely: {told}")
            break
    return "\n".join(lines)


def crash_of(log: str) -> str:
    """The innermost frames of a crash outside Python, which a log ends with; empty where it ends otherwise.

    Such a trace begins at the innermost frame, so that its last lines say nothing.
    """
    lines = log.rstrip().splitlines()
    first = next((n + 1 for n in range(len(lines) - 1, -1, -1) if not FRAME.match(lines[n])), 0)
    frames = [line for line in lines[first:] if "libc_sigaction" not in line]
    called = lines[first - 1] if first else ""
    if len(frames) <= CRASHED or BEGIN in called:
        return ""
    return "\n".join(f"  {line.strip()[:CUT]}" for line in frames[:CRASHED])


def message_of(text: str) -> str:
    """An engine's own error, without the lines that ``explain`` and a kept log add to it.

    >>> message_of("no such size\\n  at engine.py:7 in make\\n  whole log: engine.log")
    'no such size'
    """
    return ADDED.split(text)[0]


def _frames(block: str) -> list[Frame]:
    """The frames of one traceback, the innermost last; a rank's lines have the rank in front of them."""
    lines = block.splitlines()
    found: list[Frame] = []
    for number, line in enumerate(lines):
        match = FRAME.match(line)
        if match is None:
            continue
        follows = lines[number + 1] if number + 1 < len(lines) else ""
        code = follows.removeprefix(match["lead"].rstrip()).strip()
        if FRAME.match(follows) or set(code) <= set("^~ "):
            code = ""
        found.append(Frame(match["file"], int(match["line"]), match["function"], code))
    return found


def _last_error(log: str) -> str:
    """The last line of the log that names an error."""
    named = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)\b.*)$")
    return next((m[1] for line in reversed(log.splitlines()) if (m := named.search(line))), "")


def keep_log(log: str) -> Path | None:
    """Write a log to where it stays and return the file; None where that cannot be, and then nothing is left of it."""
    folder = Path(tempfile.gettempdir()) / f"paritykit-logs-{os.getuid()}"
    file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        file.write_text(log, encoding="utf-8")
        for old in sorted(folder.glob("*.log"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
            folder.rmdir()
        return None
    return file
