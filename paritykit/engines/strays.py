"""What a watched KV cache tells: which slots hold what they should not. Torch-free.

A *slot* is one position's place in a block. In a step a request may write the slots of the positions that it computes,
in the blocks of its own table, and nothing else may change: not its earlier positions, not other requests' blocks, not
blocks of nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

Kind = Literal["foreign", "lost", "shared"]
"""Changed without belonging to a position of the step; not written though it does; in two requests' tables at once."""


class Access(NamedTuple):
    """What one request does in a step: it writes positions ``start`` to ``end`` and may read those from ``first`` on.

    ``table`` are its blocks of ``size`` positions each, as the scheduler gave them; ``group`` tells tables of different
    kinds of layers apart. ``case`` is the number of its case. ``reuses``: its first blocks may be those of a text that
    begins alike, even one that is computed in the same step.
    """

    case: int
    table: Sequence[int]
    size: int
    start: int
    end: int
    first: int = 0
    group: int = 0
    reuses: bool = False

    def slots(self) -> list[int]:
        """The slots that it writes, ``block * size + offset``."""
        return [self.table[p // self.size] * self.size + p % self.size for p in range(self.start, self.end)]

    def written_blocks(self) -> set[int]:
        """The blocks that it writes to."""
        return self._blocks(self.start)

    def known_blocks(self) -> set[int]:
        """The blocks that it reads or writes."""
        return self._blocks(min(self.first, self.start))

    def _blocks(self, first: int) -> set[int]:
        return set(self.table[first // self.size : -(-self.end // self.size)]) if self.end > first else set()


class Stray(msgspec.Struct, frozen=True, kw_only=True):
    """Slots of one layer on one rank that are wrong after a step: how many, and where the first is.

    ``offset`` is its place in the block, -1 where only blocks are told apart; ``part`` says what of it. ``cases`` are
    the numbers of those in the step, none for what came after the last; ``owner`` is the case whose block it is, -1 for
    nobody's. ``beside`` are layers that share the memory.
    """

    layer: str
    kind: Kind
    block: int
    offset: int
    slots: int
    step: int
    part: str = ""
    rank: int = 0
    cases: list[int] = []
    owner: int = -1
    beside: list[str] = []


class Watched(msgspec.Struct, kw_only=True):
    """What one rank saw. ``layers`` were watched, over ``steps`` steps; ``unwatched`` were not, for a reason."""

    steps: int = 0
    layers: list[str] = []
    unwatched: dict[str, str] = {}
    strays: list[Stray] = []


def shared_blocks(accesses: Sequence[Access]) -> Iterator[tuple[int, Access, Access]]:
    """Blocks that one request writes to while another of the same group has it in its table: (block, writer, other).

    Where texts that begin alike share blocks, one may read what the other writes, at the same place in both.
    """
    for writer in accesses:
        for other in accesses:
            if other is not writer and other.group == writer.group:
                theirs = other.written_blocks()
                for block in sorted(writer.written_blocks() & other.known_blocks()):
                    alike = other.reuses and writer.table.index(block) == other.table.index(block)
                    if block in theirs or not alike:
                        yield block, writer, other


def cache_facts(ranks: Sequence[Watched | None]) -> dict[str, Any]:
    """What all ranks saw, as a capture's fact ``cache``; empty where none watched."""
    found = [r for r in ranks if r is not None]
    if not found:
        return {}
    merged = Watched(
        steps=max(r.steps for r in found),
        layers=list(dict.fromkeys(n for r in found for n in r.layers)),
        unwatched={n: reason for r in found for n, reason in r.unwatched.items()},
        strays=[s for r in found for s in r.strays],
    )
    return {"cache": msgspec.to_builtins(merged)}
