"""Rules from weight provenance: a module of the reference is where its weights landed in the candidate. Torch-free.

No family and no engine is known here: the checkpoint's tensors go to parameters on both sides, and the output columns
of a candidate's module are those rows of its weight that the reference's rows landed in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from paritykit.mapping.rules import Block
from paritykit.provenance.weightmap import Landing

SOURCE = "weight provenance"


class Home(NamedTuple):
    """Where a reference module's weights live: a candidate module, and its output columns in the reference's order.

    ``blocks`` is None where columns do not say it: weights that are not one slice for each output feature.
    """

    module: str
    blocks: tuple[Block, ...] | None


def landings_of(facts: Mapping[str, Any]) -> list[Landing]:
    """The landings that an engine's facts hold; none where it was not traced."""
    found: list[Landing] = msgspec.convert(facts.get("landings", []), list[Landing])
    return found


def find_homes(
    landings: Iterable[Landing],
    *,
    parameters: Mapping[str, str],
    features: Mapping[str, int],
    owner: Mapping[str, str],
    home: Mapping[str, str],
) -> dict[str, Home]:
    """Reference module path to its home, where all of its tensors live in one candidate module.

    ``parameters``: tensor to the reference's parameter; ``features``: tensor to its axis of output features;
    ``owner``: the reference's parameter to its module; ``home``: the candidate's parameter to its module.
    """
    modules: dict[str, dict[str, dict[str, list[Landing]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for landing in landings:
        module = owner.get(parameters.get(landing.tensor, ""))
        there = home.get(landing.parameter)
        if module and there:
            modules[module][there][landing.tensor].append(landing)
    mixed = _mixed(modules)
    found = {}
    for module, places in modules.items():
        if len(places) == 1:
            ((there, tensors),) = places.items()
            if there not in mixed:
                found[module] = Home(there, _columns(tensors, features))
    return found


def _mixed(modules: Mapping[str, Mapping[str, Mapping[str, list[Landing]]]]) -> set[str]:
    """Candidate modules whose matrices stand for different reference modules: their output is neither's."""
    users: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, places in modules.items():
        for there, tensors in places.items():
            for landing in (x for landings in tensors.values() for x in landings if len(x.target) > 1):
                users[there][landing.parameter].add(module)
    return {there for there, held in users.items() if len({frozenset(m) for m in held.values()}) > 1}


def _columns(tensors: Mapping[str, list[Landing]], features: Mapping[str, int]) -> tuple[Block, ...] | None:
    """The columns that every tensor with output features agrees on."""
    told = {_blocks(landings, features[name]) for name, landings in tensors.items() if name in features}
    return told.pop() if len(told) == 1 else None


def _blocks(landings: list[Landing], axis: int) -> tuple[Block, ...] | None:
    """Blocks in order of the tensor's output features, each of the lowest rank that holds it; None if irregular."""
    by_start: dict[int, Block] = {}
    for x in sorted(landings, key=lambda x: x.rank):
        if axis not in x.axes:
            return None
        along, source = x.target[x.axes.index(axis)], x.source[axis]
        if along.step != 1 or source.step != 1:
            return None
        held = by_start.setdefault(source.start, Block(x.rank, along.start, along.count))
        if held.rank == x.rank and (held.start, held.length) != (along.start, along.count):
            return None
    ordered = sorted(by_start.items())
    if any(start != sum(b.length for _, b in ordered[:n]) for n, (start, _) in enumerate(ordered)):
        return None
    return merge_blocks(tuple(b for _, b in ordered))


def merge_blocks(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Blocks with neighbours that continue each other made one.

    >>> merge_blocks((Block(0, 0, 4), Block(0, 4, 2), Block(1, 0, 2)))
    (Block(rank=0, start=0, length=6), Block(rank=1, start=0, length=2))
    """
    merged: list[Block] = []
    for b in blocks:
        if merged and merged[-1].rank == b.rank and merged[-1].start + merged[-1].length == b.start:
            merged[-1] = Block(b.rank, merged[-1].start, merged[-1].length + b.length)
        else:
            merged.append(b)
    return tuple(merged)
