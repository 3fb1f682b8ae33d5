"""Where weights landed, as a tree on the terminal: checkpoint name, slice, parameter, rank, status. Torch-free.

Layers and experts that are laid out alike share one branch, named by all their numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from paritykit.ledger.subject import numbers, pattern
from paritykit.reports.wording import shorten
from paritykit.results import Results, WeightRow

STYLES = {"pass": "green", "skip": "dim"}
Key = tuple[str, ...]


def print_weights(results: Results, *, console: Console, verbose: bool = False) -> None:
    """Print the tree of a run's weight records; ``verbose`` keeps every layer apart. Nothing for a run without."""
    if results.weights:
        console.print(weight_tree(results.weights, merged=not verbose), soft_wrap=True, highlight=False)


def weight_tree(rows: Iterable[WeightRow], *, merged: bool = True) -> Tree:
    """The rows as a tree of dotted names."""
    root = Tree(Text("checkpoint -> parameters", style="bold"), guide_style="dim")
    branches: dict[Key, Tree] = {(): root}
    groups = _groups(rows, merged=merged)
    for name, members in groups.items():
        *path, last = name.rsplit(".", 2) if name.count(".") > 1 else ["", name]
        parent = root
        steps = tuple(path[0].split(".")) if len(path) > 1 else ()
        for depth in range(1, len(steps) + 1):
            if steps[:depth] not in branches:
                branches[steps[:depth]] = parent.add(Text(steps[depth - 1]))
            parent = branches[steps[:depth]]
        label = Text(".".join([*path[1:], last]), style="bold", overflow="fold")
        if len(members) == 1:
            parent.add(label.append("  ", style="not bold").append_text(_line(members[0], ranks=False)))
        else:
            leaf = parent.add(label)
            for row in members:
                leaf.add(_line(row, ranks=True))
    return root


def _groups(rows: Iterable[WeightRow], *, merged: bool) -> dict[str, list[WeightRow]]:
    """Rows by the name to show: that of all tensors that landed in the same way."""
    by_tensor: dict[str, list[WeightRow]] = defaultdict(list)
    for row in rows:
        by_tensor[row.tensor or row.parameter].append(row)
    if not merged:
        return dict(by_tensor)
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, members in by_tensor.items():
        told = [(pattern(r.parameter), r.rank, r.source, _target(r), r.change, r.status) for r in members]
        same = all(r.status == "pass" for r in members)
        alike[(pattern(name), *told) if same else (name,)].append(name)
    return {_joined(names): by_tensor[names[0]] for names in alike.values()}


def _joined(names: list[str]) -> str:
    """One name for several that differ in their numbers.

    >>> _joined(["layers.0.q", "layers.1.q", "layers.3.q"])
    'layers.{0-1,3}.q'
    """
    if len(names) == 1:
        return names[0]
    columns = [sorted(set(column)) for column in zip(*(numbers(n) for n in names), strict=True)]
    texts = iter([str(c[0]) if len(c) == 1 else "{" + _ranges(c) + "}" for c in columns])
    return "".join(next(texts) if part == "*" else part for part in _split(pattern(names[0])))


def _split(text: str) -> list[str]:
    parts = text.split("*")
    return [p for pair in zip(parts, ["*"] * len(parts), strict=True) for p in pair][:-1]


def _ranges(found: list[int]) -> str:
    runs: list[list[int]] = []
    for n in found:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _target(row: WeightRow) -> str:
    """The index into the parameter, with ``*`` for the place of the tensor's own last number, an expert's say."""
    own = numbers(row.tensor)
    first, comma, rest = row.target.removeprefix("[").partition(", ")
    return f"[*{comma}{rest}" if own and comma and first == str(own[-1]) else row.target


def _line(row: WeightRow, *, ranks: bool) -> Text:
    place = f"{row.source} -> {_relative(row)}{_target(row)}" if row.tensor and row.parameter else "nowhere"
    place = place if row.tensor else "from nothing"
    rank = f"rank {row.rank}  " if ranks else ""
    text = Text(f"{rank}{place}{f'  {row.change}' if row.change else ''}  ", overflow="fold", style="not bold")
    text.append(row.status, style=STYLES.get(row.status, "bold red"))
    return text.append(f"  {shorten(row.message, 300)}") if row.message else text


def _relative(row: WeightRow) -> str:
    """The parameter's name without the part of its path that the tensor has too."""
    one, other = row.tensor.split("."), row.parameter.split(".")
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    return ".".join(other[same:])
