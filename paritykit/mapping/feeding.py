"""Rules turned round: which columns of the reference's points stand in which columns of the candidate's, on each rank.

Torch-free.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from paritykit.captures.feed import FedPoint, Feed, Fill
from paritykit.captures.manifest import Manifest, leading_points, split_key
from paritykit.mapping.rules import Block, Rule

FED_PORTS = ("", "input")
"""What a module gives and what it takes can be exchanged; a cache is only shown."""


def can_feed(rule: Rule) -> bool:
    """Whether a rule can be turned round: not where its numbers are made of the candidate's, from two points say."""
    return split_key(rule.candidate)[1] in FED_PORTS and not rule.made


def make_feed(rules: Iterable[Rule], *, reference: Manifest, folder: Path, candidate: Manifest) -> Feed:
    """What the candidate is fed, so that each of its points that ``rules`` name goes on with the reference's values.

    ``folder`` holds the reference's capture. Columns that no rule names stay the candidate's own; where several rules
    name the same ones, the first counts.
    """
    ours = leading_points(reference.points)
    ranks: dict[str, set[int]] = defaultdict(set)
    for point in candidate.points:
        ranks[point.key].add(point.rank)
    fills: dict[tuple[str, int], list[Fill]] = defaultdict(list)
    for rule in filter(can_feed, rules):
        for rank, fill in _fills(rule, math.prod(ours[rule.reference].row), ranks[rule.candidate]):
            _add(fills[rule.candidate, rank], fill)
    points = tuple(FedPoint(key, rank, tuple(found)) for (key, rank), found in fills.items())
    return Feed(str(folder.absolute()), points)


def replicated(blocks: Iterable[Block], ranks: Iterable[int]) -> dict[int, list[Block]]:
    """The blocks by rank, for every one of ``ranks``: one that is not named holds what the nearest before it does.

    A rule names each part of a tensor once, on the first rank that has it.

    >>> replicated([Block(0, 4, 2)], [0, 1])[1]
    [Block(rank=0, start=4, length=2)]
    """
    named: dict[int, list[Block]] = defaultdict(list)
    for block in blocks:
        named[block.rank].append(block)
    return {rank: named[max((r for r in named if r <= rank), default=min(named))] for rank in sorted(ranks)}


def _fills(rule: Rule, width: int, ranks: Iterable[int]) -> Iterator[tuple[int, Fill]]:
    if not rule.blocks:
        yield from ((rank, Fill(rule.reference, 0, 0, width)) for rank in ranks)
        return
    first, begins = 0, dict[Block, int]()
    for block in rule.blocks:
        begins[block] = first
        first += block.length
    for rank, blocks in replicated(rule.blocks, ranks).items():
        yield from ((rank, Fill(rule.reference, begins[b], b.start, b.length)) for b in blocks)


def _add(fills: list[Fill], new: Fill) -> None:
    if all(new.start + new.length <= f.start or f.start + f.length <= new.start for f in fills):
        fills.append(new)
