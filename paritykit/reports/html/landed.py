"""The weights page: its counts, the rows that read without JavaScript, and all rows packed for the tree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from paritykit.reports.html.columns import Strings, squeeze
from paritykit.reports.html.strips import Strip, strips_of
from paritykit.reports.landings import RIGHT, Alike, grouped, is_wrong, relative, subject_of, target
from paritykit.results import Results, WeightRow

CHECK = "weights"
STATIC_ROWS = 60
TEXTS = ("tensor", "parameter", "source", "target", "change", "dtype", "status", "message")


class Counts(NamedTuple):
    """What is told on top. ``elements`` are those of the checkpoint; ``kinds`` counts tensors and parameters."""

    tensors: int
    elements: int
    landed: int
    ranks: int
    skipped: int
    kinds: list[tuple[str, int]]

    @property
    def problems(self) -> int:
        """Tensors and parameters with which something is wrong."""
        return sum(amount for _, amount in self.kinds)


class StaticRow(NamedTuple):
    """A row shown without JavaScript: ``name`` stands for ``amount`` tensors."""

    name: str
    amount: int
    row: WeightRow
    parameter: str
    target: str


class Weights(NamedTuple):
    """All that the template needs; ``left_out`` rows are only in the packed data, ``more_strips`` nowhere."""

    counts: Counts
    rows: list[StaticRow]
    left_out: int
    strips: list[Strip]
    more_strips: int
    packed: str


def weights_of(results: Results) -> Weights | None:
    """The weights page of a run; None where it has no weight records."""
    if not results.weights:
        return None
    groups = grouped(results.weights)
    rows = [row for group in sorted(groups, key=lambda g: not g.wrong) for row in _static(group)]
    strips, more = strips_of(results.weights)
    found = {f.point for f in results.findings if f.check == CHECK and not f.case}
    packed = squeeze(_index(results.weights, groups, found))
    return Weights(
        counts_of(results.weights), rows[:STATIC_ROWS], max(0, len(rows) - STATIC_ROWS), strips, more, packed
    )


def _static(group: Alike) -> Iterator[StaticRow]:
    for row, place in zip(group.rows, group.places, strict=True):
        shown = target(row) if len(group.tensors) > 1 else row.target
        yield StaticRow(group.name, len(group.tensors), row, place, shown)


def counts_of(rows: list[WeightRow]) -> Counts:
    """The counts of all rows. A tensor has landed where each of its rows is right and names a parameter."""
    boxes: dict[str, dict[str, int]] = defaultdict(dict)
    kinds: dict[str, set[str]] = defaultdict(set)
    astray: set[str] = set()
    for row in rows:
        if row.tensor:
            # Ranks and tied parameters repeat a slice.
            boxes[row.tensor].setdefault(row.source, row.elements)
        if row.status != "pass":
            kinds[row.status].add(subject_of(row))
        if row.status != "pass" or not row.parameter:
            astray.add(row.tensor)
    return Counts(
        tensors=len(boxes),
        elements=sum(sum(found.values()) for found in boxes.values()),
        landed=len(boxes.keys() - astray),
        ranks=len({row.rank for row in rows if row.tensor and row.parameter}),
        skipped=len(kinds["skip"]),
        kinds=sorted((kind, len(names)) for kind, names in kinds.items() if kind not in RIGHT),
    )


def _index(rows: list[WeightRow], groups: list[Alike], found: set[str]) -> dict[str, Any]:
    strings = Strings()
    columns: dict[str, Any] = {name: [strings.number(getattr(r, name)) for r in rows] for name in TEXTS}
    columns["place"] = [strings.number(relative(r.parameter, to=r.tensor)) for r in rows]
    columns["rank"] = [r.rank for r in rows]
    columns["elements"] = [r.elements for r in rows]
    columns["wrong"] = [int(is_wrong(r)) for r in rows]
    number = {name: n for n, group in enumerate(groups) for name in group.tensors}
    columns["group"] = [number[subject_of(r)] for r in rows]
    return {
        "rows": len(rows),
        "columns": columns,
        "groups": [g.name for g in groups],
        "links": [int(g.wrong and g.name in found) for g in groups],
        "targets": [[strings.number(target(r)) for r in g.rows] if len(g.tensors) > 1 else [] for g in groups],
        "strings": strings.texts(),
    }
