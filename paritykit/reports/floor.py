"""A measured noise floor on the terminal: what is noisiest, and what moved."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from paritykit.reports.wording import count, number, visible

SHOWN = 8


def print_floor(floors: Mapping[str, Mapping[str, float]], *, moved: list[str], console: Console) -> None:
    """The noisiest points, then the lines of ``moved``."""
    values = sorted(((v, p, c) for p, cases in floors.items() for c, v in cases.items()), reverse=True)
    exact = sum(v == 0 for v, _, _ in values)
    lines = [f"noise floor of {count(len(floors), 'point')}: {exact:,} of {len(values):,} without noise"]
    lines += [f"  {number(v):<9} {p} / {c}" for v, p, c in values[:SHOWN]]
    if moved:
        lines += [f"moved: {count(len(moved), 'number')}", *(f"  {line}" for line in moved[:SHOWN])]
    for line in lines:
        console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
