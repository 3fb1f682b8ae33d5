"""Weight records for showing: tensors that landed alike become one, named by all their numbers. Torch-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from paritykit.provenance.names import NUMBER, numbers, pattern
from paritykit.results import WeightRow

RIGHT = ("pass", "skip")
LONGEST = 1000
"""Longer names are left apart: a name that was made to be long may hold a number that no integer takes."""


class Alike(NamedTuple):
    """Tensors that landed in the same way: one name for all, the rows of the first, and a row's parameter for all.

    A parameter is named without the part of its path that the tensor's name has too.
    """

    name: str
    tensors: list[str]
    rows: list[WeightRow]
    places: list[str]

    @property
    def wrong(self) -> bool:
        """Whether something is wrong with them."""
        return any(is_wrong(row) for row in self.rows)


def is_wrong(row: WeightRow) -> bool:
    """Whether a row's status names a problem."""
    return row.status not in RIGHT


def subject_of(row: WeightRow) -> str:
    """What a row is filed under: its tensor, or the parameter that nothing filled."""
    return row.tensor or row.parameter


def grouped(rows: Iterable[WeightRow], *, merged: bool = True) -> list[Alike]:
    """Rows by tensor in their own order; with ``merged``, layers and experts that landed alike are one."""
    by_tensor: dict[str, list[WeightRow]] = defaultdict(list)
    for row in rows:
        by_tensor[subject_of(row)].append(row)
    alike: dict[object, list[str]] = defaultdict(list)
    for name, members in by_tensor.items():
        alike[_layout(name, members) if merged else name].append(name)
    return [_alike(names, [by_tensor[n] for n in names]) for names in alike.values()]


def _alike(names: list[str], members: list[list[WeightRow]]) -> Alike:
    return Alike(joined(names), names, members[0], [_place(rows) for rows in zip(*members, strict=True)])


def _place(rows: tuple[WeightRow, ...]) -> str:
    """One name for the same parameter of several layers: without what all share with their tensors, if they do."""
    own = [relative(r.parameter, to=r.tensor) for r in rows]
    return joined(own if len({pattern(p) for p in own}) == 1 else [r.parameter for r in rows])


def _layout(name: str, members: list[WeightRow]) -> object:
    """How a tensor landed, the same for all that may be shown as one; what is wrong stays apart."""
    if len(name) > LONGEST or any(is_wrong(r) for r in members):
        return name
    told = [
        (pattern(r.parameter), r.rank, r.source, target(r), r.change, r.elements, r.dtype, r.status, r.message)
        for r in members
    ]
    return (pattern(name), len(NUMBER.findall(name)), *told)


def joined(names: list[str]) -> str:
    """One name for several that differ in their numbers only.

    >>> joined(["layers.0.q", "layers.1.q", "layers.3.q"])
    'layers.{0-1,3}.q'
    """
    if len(names) == 1:
        return names[0]
    columns = [sorted(set(column)) for column in zip(*(numbers(n) for n in names), strict=True)]
    texts = iter([str(c[0]) if len(c) == 1 else "{" + ranges(c) + "}" for c in columns])
    return NUMBER.sub(lambda _: next(texts), names[0])


def ranges(found: list[int]) -> str:
    """Sorted numbers in short.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for n in found:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def target(row: WeightRow) -> str:
    """The index into the parameter, with ``*`` for the place of the tensor's own last number, an expert's say."""
    own = numbers(row.tensor) if len(row.tensor) <= LONGEST else []
    first, comma, rest = row.target.removeprefix("[").partition(", ")
    return f"[*{comma}{rest}" if own and comma and first == str(own[-1]) else row.target


def relative(name: str, *, to: str) -> str:
    """``name`` without the part of its path that ``to`` has too.

    >>> relative("model.layers.0.attn.qkv.weight", to="model.layers.0.attn.q.weight")
    'qkv.weight'
    """
    one, other = to.split("."), name.split(".")
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    return ".".join(other[same:])
