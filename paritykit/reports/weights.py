"""Where weights landed, as a tree on the terminal: checkpoint name, slice, parameter, rank, status. Torch-free.

Layers and experts that are laid out alike share one branch, named by all their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from paritykit.reports.landings import grouped, target
from paritykit.reports.wording import shorten
from paritykit.results import Results, WeightRow

WIDE = 1000
"""Columns of a log file, where no line is cut."""
STYLES = {"pass": "green", "skip": "dim"}
Key = tuple[str, ...]


def print_weights(results: Results, *, console: Console, verbose: bool = False) -> None:
    """Print the tree of a run's weight records; ``verbose`` keeps every layer apart. Nothing for a run without."""
    if not results.weights:
        return
    if not console.is_terminal:
        console.width = WIDE
    console.print(weight_tree(results.weights, merged=not verbose), crop=False, highlight=False)


def weight_tree(rows: Iterable[WeightRow], *, merged: bool = True) -> Tree:
    """The rows as a tree of dotted names."""
    root = Tree(Text("checkpoint -> parameters", style="bold"), guide_style="dim")
    branches: dict[Key, Tree] = {(): root}
    for name, _, members, places in grouped(rows, merged=merged):
        *path, last = name.rsplit(".", 2) if name.count(".") > 1 else ["", name]
        parent = root
        steps = tuple(path[0].split(".")) if len(path) > 1 else ()
        for depth in range(1, len(steps) + 1):
            if steps[:depth] not in branches:
                branches[steps[:depth]] = parent.add(Text(steps[depth - 1]))
            parent = branches[steps[:depth]]
        label = Text(".".join([*path[1:], last]), style="bold", overflow="fold")
        if len(members) == 1:
            parent.add(label.append("  ", style="not bold").append_text(_line(members[0], places[0], ranks=False)))
        else:
            leaf = parent.add(label)
            for row, parameter in zip(members, places, strict=True):
                leaf.add(_line(row, parameter, ranks=True))
    return root


def _line(row: WeightRow, parameter: str, *, ranks: bool) -> Text:
    place = f"{row.source} -> {parameter}{target(row)}" if row.tensor and row.parameter else "nowhere"
    place = place if row.tensor else "from nothing"
    rank = f"rank {row.rank}  " if ranks else ""
    text = Text(f"{rank}{place}{f'  {row.change}' if row.change else ''}  ", overflow="fold", style="not bold")
    text.append(row.status, style=STYLES.get(row.status, "bold red"))
    return text.append(f"  {shorten(row.message, 300)}") if row.message else text
