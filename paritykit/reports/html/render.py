"""Put the page together: template, styles, scripts and packed data in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from paritykit.reports.added_up import added_up
from paritykit.reports.alike import TITLE, UNREAD, meanings
from paritykit.reports.html import sections, view
from paritykit.reports.html.columns import Packed, pack
from paritykit.reports.html.landed import weights_of
from paritykit.reports.html.rows import LABELS, LETTERS, Row, rows_of, tally
from paritykit.reports.repro import repro, script
from paritykit.reports.wording import WORDS, headline, headroom, measured, number, shorten, source, starts, state
from paritykit.results import Results

HERE = Path(__file__).parent
SCRIPTS = ("inflate", "data", "query", "table", "details", "chart", "main")
_DARK = re.compile(r':root\[data-theme="dark"\] (\{.*?\n\})', re.DOTALL)
_COMMENT = re.compile(r"/\*(?!!).*?\*/\s*", re.DOTALL)


def render(results: Results) -> bytes:
    """The report of ``results`` as one HTML file; the same records give the same bytes."""
    rows = rows_of(results)
    page = environment().get_template("report.html.j2").render(**_context(results, rows, pack(rows)))
    return page.encode("utf-8", "backslashreplace")


def environment() -> Environment:
    """The template environment: every value is escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE / "template"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"number": number, "measured": measured, "source": source, "headroom": headroom}
    made.filters |= {"short": lambda text, limit=view.NAME: shorten(text, limit), "thousands": "{:,}".format}
    return made


def _context(results: Results, rows: list[Row], packed: Packed) -> dict[str, Any]:
    tokens, more_tokens = sections.tokens_of(results)
    gaps, more_gaps = sections.gaps_of(rows)
    kind = state(results)
    return {
        "run": results.run, "summary": results.summary, "state": kind, "word": WORDS[kind], "cases": results.cases,
        "headline": shorten(headline(results), 600), "sides": view.sides_of(results), "panel": view.panel_of(results),
        "matrix": view.matrix_of(results, rows), "rows": view.static_rows(rows), "total": len(rows),
        "tally": tally(rows), "command": repro(results), "python": script(results),
        "labels": LABELS, "letters": LETTERS, "gaps": gaps, "more_gaps": more_gaps,
        "tokens": tokens, "more_tokens": more_tokens, "policies": sections.policies_of(results), "packed": packed,
        "added_up": added_up(results), "alike": meanings(results), "alike_title": TITLE, "unread": UNREAD,
        "starts": starts(results), "nothing": view.coverage_words(results),
        "profiles": any(f.metric for f in results.findings),
        "weights": weights_of(results), "css": _css(results), "script": _script(results),
    }  # fmt: skip


def _css(results: Results) -> Markup:
    """The styles; the dark palette twice, for a reader who asked for it and for a system that is set to it."""
    text = _read("vendor/uPlot.min.css") + _DARK.sub(_dark_twice, _read("template/report.css"), count=1)
    text += _read("template/weights.css") if results.weights else ""
    return Markup(_COMMENT.sub("", text))  # noqa: S704  (the package's own files)


def _dark_twice(found: re.Match[str]) -> str:
    return f'{found[0]}\n@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {found[1]} }}'


def _script(results: Results) -> Markup:
    """uPlot with its licence, then the page's own script in one scope."""
    licence = "/*!\n" + _read("vendor/LICENSE.uPlot").replace("*/", "") + "*/\n"
    names = (*SCRIPTS, "weights") if results.weights else SCRIPTS
    own = "\n".join(_read(f"template/js/{name}.js") for name in names)
    text = f'{licence}{_read("vendor/uPlot.iife.min.js")}\n(() => {{\n"use strict";\n{own}\n}})();\n'
    return Markup(text)  # noqa: S704  (the package's own files)


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
