"""Readings: how a candidate's point, which disagrees, is to be read to be the reference's. Found on rows, by no name.

Tried are the sum and difference with another point of the candidate, the product and quotient with a gate, one constant
factor, columns in another order, and another point in its place. A reading is one rule for a *kind* of point: the same
in every layer, other points being named by how many layers they lie before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import msgspec
import torch

from paritykit.captures.reader import Capture
from paritykit.comparison.align import own_rows, rule_rows, shared_places
from paritykit.comparison.judge import ranges
from paritykit.errors import CaptureFormatError
from paritykit.mapping.rules import GATES, Block, Rule, sized_blocks

LAYER = re.compile(r"(?<=\.)\d+(?=[.#@]|$)")
ROWS = 24
"""Rows that a reading is looked for on; on all others it is then judged like any other rule."""
NEAR = 0.05
"""What a reading may leave of a point to be tried at all. Others were seen to leave 0.3 and more."""
WIDEST = 4096
"""Columns up to which another order of them is looked for: every column is held against every other."""


class Reading(NamedTuple):
    """``how`` a point is read, with another point: its name with ``{}`` for the layer, so many layers ``on``.

    ``on`` is None where that point lies in no layer.
    """

    how: str
    other: str = ""
    on: int | None = None


class Fit(NamedTuple):
    """A reading, the rule that it is at one point, and what it leaves of the rows that it was looked for on."""

    reading: Reading
    rule: Rule
    left: float


def kind_of(key: str) -> str:
    """A point's name with ``{}`` for its layer: the same for the same point of every layer.

    >>> kind_of("model.layers.3.mlp#input")
    'model.layers.{}.mlp#input'
    """
    return LAYER.sub("{}", key, count=1)


def layer_of(key: str) -> int | None:
    """The number of the layer that a point lies in."""
    found = LAYER.search(key)
    return None if found is None else int(found[0])


class Search:
    """Looks for readings of one rule's point in the rows of one case."""

    def __init__(self, rule: Rule, *, reference: Capture, candidate: Capture, case: str, matches: bool = True) -> None:
        self._rule, self._candidate, self._case = rule, candidate, case
        places = shared_places(rule, reference, candidate, case)
        self._start, self._length = _stretch(places)
        rows = own_rows(reference, rule.reference, case, self._start, self._length) if self._length else None
        self._truth = None if rows is None else rows.double()
        self._own = self._read(rule) if matches else None

    def fits(self) -> list[Fit]:
        """Every reading that leaves little of the point."""
        if self._truth is None or not float(self._truth.norm()):
            return []
        found = [*self._alone(), *(f for key in self._others() for f in self._beside(key))]
        return [f for f in found if f.left < NEAR]

    def _alone(self) -> Iterator[Fit]:
        """Readings of the point by itself."""
        if self._own is None or self._truth is None:
            return
        energy = float((self._own * self._own).sum())
        factor = float((self._truth * self._own).sum()) / energy if energy else 0.0
        if factor and abs(factor - 1) > NEAR / 10:
            yield self._fit(
                Reading("factor"), self._made(f"multiplied by {factor:.4g}", factor=factor), self._own * factor
            )
        order = _order(self._truth, self._own)
        if order is not None:
            blocks = _reordered(self._rule, self._width(self._rule.candidate), order)
            text = "its columns in another order"
            if blocks:
                yield self._fit(Reading("order"), self._made(text, blocks=blocks), self._own[:, order])

    def _beside(self, key: str) -> Iterator[Fit]:
        """Readings of the point together with another one, or of that one in its place."""
        reading = _named(key, self._rule.reference)
        wanted = self._truth.shape[1] if self._truth is not None else 0
        blocks = sized_blocks(wanted=wanted, local=self._width(key), ranks=sorted(self._candidate.points[key]))
        if blocks is not None:
            made = Rule(reference=self._rule.reference, candidate=key, blocks=blocks, source="its numbers", reading=key)
            yield from self._tried(reading._replace(how="other"), made)
        if self._own is None:
            return
        row, own = self._candidate.point(key).row, self._candidate.point(self._rule.candidate).row
        if row == own:
            yield from self._tried(reading._replace(how="plus"), self._made(f"with {key} added", plus=key))
            yield from self._tried(reading._replace(how="minus"), self._made(f"without {key}", minus=key))
        if row in ([1], own) and not self._rule.blocks:
            for how, text in GATES.items():
                told = f"its output{text.format(key)}"
                yield from self._tried(reading._replace(how=how), self._made(told, gate=(how, key)))

    def _tried(self, reading: Reading, rule: Rule) -> Iterator[Fit]:
        rows = self._read(rule)
        if rows is not None and self._truth is not None and rows.shape == self._truth.shape:
            yield self._fit(reading, rule, rows)

    def _fit(self, reading: Reading, rule: Rule, rows: torch.Tensor) -> Fit:
        assert self._truth is not None
        left = float((rows - self._truth).norm() / self._truth.norm())
        return Fit(reading, rule, left if math.isfinite(left) else math.inf)

    def _made(self, text: str, **fields: object) -> Rule:
        return msgspec.structs.replace(self._rule, reading=text, **fields)

    def _others(self) -> list[str]:
        """The candidate's points in this layer, the one before, and in none."""
        layer = layer_of(self._rule.candidate)
        near = (None, layer, None if layer is None else layer - 1)
        return [k for k in self._candidate.points if k != self._rule.candidate and layer_of(k) in near]

    def _width(self, key: str) -> int:
        return math.prod(self._candidate.point(key).row)

    def _read(self, rule: Rule) -> torch.Tensor | None:
        """What a rule gives on the rows, ``[rows, features]``; None where its points have not these rows."""
        if not self._length or any(k not in self._candidate.points for k in rule.points):
            return None
        try:
            return rule_rows(rule, self._candidate, self._case, self._start, self._length).double()
        except CaptureFormatError:
            return None


def best_readings(fits: Iterable[Fit], *, elsewhere: bool = False) -> list[Fit]:
    """The fits, the best first; those that do without the point itself last, or first where it may be ``elsewhere``."""
    return sorted(fits, key=lambda f: ((f.reading.how == "other") != elsewhere, f.left))


def read_alike(fit: Fit, rule: Rule, *, known: Container[str]) -> Rule | None:
    """The rule of another layer's point under the same reading; None where it lacks the other point.

    A factor and an order of columns are those that were found, and not looked for anew.
    """
    reading, layer = fit.reading, layer_of(rule.reference)
    if not reading.other:
        blocks = fit.rule.blocks if reading.how == "order" else rule.blocks
        return msgspec.structs.replace(rule, blocks=blocks, factor=fit.rule.factor, reading=fit.rule.reading)
    place = None if reading.on is None or layer is None else layer + reading.on
    key = reading.other if place is None else reading.other.replace("{}", str(place))
    if key not in known or (place is not None and place < 0):
        return None
    old = fit.rule.candidate if reading.how == "other" else fit.rule.points[1]
    text = fit.rule.reading.replace(old, key)
    if reading.how == "other":
        return msgspec.structs.replace(fit.rule, reference=rule.reference, candidate=key, reading=text)
    fields = {"gate": (reading.how, key)} if reading.how in GATES else {reading.how: key}
    return msgspec.structs.replace(rule, reading=text, **fields)


def _named(key: str, beside: str) -> Reading:
    layer, own = layer_of(key), layer_of(beside)
    return Reading("", kind_of(key), None if layer is None or own is None else layer - own)


def _stretch(places: list[int]) -> tuple[int, int]:
    """The longest run of consecutive places, at most ``ROWS`` of it: its first and its length."""
    first, last = max(ranges(places), key=lambda r: r[1] - r[0], default=(0, -1))
    return first, min(last - first + 1, ROWS)


def _order(truth: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """The columns of ``rows`` that are those of ``truth``, each used once, ``[features]``; None if there are none."""
    if truth.shape != rows.shape or truth.shape[1] > WIDEST or len(truth) < 2:
        return None
    order = torch.cdist(truth.T.contiguous(), rows.T.contiguous()).argmin(dim=1)
    plain = torch.arange(len(order))
    return None if len(set(order.tolist())) != len(order) or torch.equal(order, plain) else order


def _reordered(rule: Rule, local: int, order: torch.Tensor) -> tuple[Block, ...]:
    """The rule's columns in another order, as blocks; none where a row is not of one axis."""
    held = rule.blocks or (Block(0, 0, local),)
    columns = [(b.rank, b.start + n) for b in held for n in range(b.length)]
    found: list[Block] = []
    for rank, column in (columns[n] for n in order.tolist()):
        last = found[-1] if found else None
        if last is not None and last.rank == rank and last.start + last.length == column:
            found[-1] = Block(rank, last.start, last.length + 1)
        else:
            found.append(Block(rank, column, 1))
    return tuple(found)
