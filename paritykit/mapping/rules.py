"""Rules: one reference point, the candidate columns that stand for it, and who said so. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

PARTS, PARENT, NEAREST = "its parts", "its parent", "nearest name"
GUESSES = (PARTS, PARENT, NEAREST)
"""Sources of a rule that nobody stated: from where a module's parts or parent are, or the longest path it lies under.

Such a rule is dropped where its numbers disagree and those of what is computed from them do not.
"""


GATES = {"times": " x {}", "times sigmoid": " x sigmoid({})", "over": " / {}", "over sigmoid": " / sigmoid({})"}
"""What a rule may do with a second point that gates the first, one number for each row or each feature."""
SHOWN_PARTS = 12


class Block(msgspec.Struct, frozen=True, array_like=True):
    """``length`` feature columns from ``start`` of one rank's tensor."""

    rank: int
    start: int
    length: int


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """The reference point's features are the candidate's ``blocks``, side by side, in this order.

    No blocks: all features, of the lowest rank that has the point. ``transpose`` swaps the last two axes of a candidate
    row first; ``plus`` is a second candidate point that is added (hidden and residual kept apart), ``minus`` one that
    is taken away, ``gate`` one that it is multiplied by as ``GATES`` says; ``factor`` multiplies the result.
    ``source`` says where the rule came from. ``reading`` says in words how the candidate's point is to be read, where
    that was found by its numbers.
    """

    reference: str
    candidate: str
    blocks: tuple[Block, ...] = ()
    transpose: bool = False
    plus: str = ""
    minus: str = ""
    gate: tuple[str, str] = ("", "")
    factor: float = 1.0
    source: str = "equal name"
    reading: str = ""

    @property
    def points(self) -> tuple[str, ...]:
        """Every candidate point that the rule reads."""
        return tuple(k for k in (self.candidate, self.plus, self.minus, self.gate[1]) if k)

    @property
    def made(self) -> bool:
        """Whether the numbers are made of the candidate's, and not only columns of them."""
        return bool(self.plus or self.minus or self.gate[1] or self.transpose or self.factor != 1.0)

    def describe(self) -> str:
        """The rule in one line, for people who doubt it.

        >>> Rule(reference="q_proj", candidate="qkv_proj", blocks=(Block(0, 0, 8),)).describe()
        'qkv_proj columns 0:8 (equal name)'
        """
        ranks = len({b.rank for b in self.blocks})
        parts = [f"{f'rank {b.rank} ' if ranks > 1 else ''}columns {b.start}:{b.start + b.length}" for b in self.blocks]
        text = self.candidate + (f" + {self.plus}" if self.plus else "") + (f" - {self.minus}" if self.minus else "")
        text += GATES[self.gate[0]].format(self.gate[1]) if self.gate[1] else ""
        text += f" x {self.factor:.6g}" if self.factor != 1.0 else ""
        if len(parts) > SHOWN_PARTS:
            parts = [*parts[:SHOWN_PARTS], f"and {len(parts) - SHOWN_PARTS} more"]
        text += f" {', '.join(parts)}" if parts else ""
        return f"{text}{' transposed' if self.transpose else ''} ({self.source})"


class Ignored(msgspec.Struct, frozen=True, kw_only=True):
    """A point that a rule leaves out on purpose, with the reason."""

    reference: str
    reason: str


class Part(msgspec.Struct, frozen=True):
    """One part of a fused tensor: columns in all, columns on each rank, and how many ranks hold the same ones."""

    total: int
    local: int
    replicas: int = 1


def fused_blocks(parts: list[Part], *, ranks: Sequence[int], wanted: int | None = None) -> tuple[Block, ...]:
    """The blocks of part ``wanted`` (all parts, one after the other, if None) of a tensor fused on each of ``ranks``.

    >>> fused_blocks([Part(4, 2), Part(2, 2, 2)], ranks=[2, 3], wanted=1)
    (Block(rank=2, start=2, length=2),)
    """
    blocks = []
    for number, part in enumerate(parts):
        if wanted is None or number == wanted:
            start = sum(p.local for p in parts[:number])
            blocks += [Block(rank, start, part.local) for rank in ranks[:: part.replicas]]
    return tuple(blocks)


def sized_blocks(*, wanted: int, local: int, ranks: Sequence[int]) -> tuple[Block, ...] | None:
    """Blocks that follow from sizes alone: whole on each of ``ranks``, sharded, sharded with replicas. None: no fit.

    >>> sized_blocks(wanted=8, local=4, ranks=[0, 1])
    (Block(rank=0, start=0, length=4), Block(rank=1, start=0, length=4))
    """
    if local == wanted:
        return ()
    width = local * len(ranks)
    if wanted and local and wanted % local == 0 and width % wanted == 0 and len(ranks) > 1:
        return tuple(Block(rank, 0, local) for rank in ranks[:: width // wanted])
    return None


def repeated_heads(wanted: Sequence[int], local: Sequence[int], *, ranks: Sequence[int]) -> tuple[Block, ...] | None:
    """Blocks for a cache row ``[heads, head_dim]`` that holds every kv head once for each query head of its group.

    ``local`` is the candidate's row ``[kv_heads, head_dim]`` on each of ``ranks``. None: no fit.

    >>> [block.rank for block in repeated_heads([4, 8], [1, 8], ranks=[0, 1])]
    [0, 0, 1, 1]
    """
    if len(wanted) != 2 or len(local) != 2 or wanted[1] != local[1]:
        return None
    (heads, size), own = wanted, local[0]
    if not own or heads % (own * len(ranks)):
        return None
    group = heads // (own * len(ranks))
    kept = [head // group for head in range(heads)]
    return tuple(Block(ranks[kv // own], kv % own * size, size) for kv in kept)
