"""Reports: each is a function of the records of a run and of nothing else.

A format is ``render(results) -> bytes``, registered by name and imported on first use; another package adds one
through the entry point group ``paritykit.reports``.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from paritykit.registry import Registry
from paritykit.results import Results, write_whole

Render = Callable[[Results], bytes]

REPORTS: Registry[Render] = Registry("report")
REPORTS.register("html", "paritykit.reports.html.render:render")
REPORTS.register("markdown", "paritykit.reports.markdown:render")
REPORTS.register("junit", "paritykit.reports.junit:render")
REPORTS.register("jsonl", "paritykit.reports.jsonl:render")
REPORTS.register("terminal", "paritykit.reports.terminal:render")


def write_report(results: Results, *, format: str, path: str | os.PathLike[str]) -> None:  # noqa: A002
    """Write ``results`` to ``path`` in a registered format; the file appears whole or not at all.

    Raises UnknownNameError for a format that is not registered, UsageError where the file cannot be written.

    >>> REPORTS.names()[:2]
    ['html', 'markdown']
    """
    write_whole(path, REPORTS.get(format)(results))
