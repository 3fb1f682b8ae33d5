"""The matrix as a page."""

from __future__ import annotations

from pathlib import Path

from benchmarks.matrix.row import Row


def write_page(rows, classes, path):
    path.write_text("")
