"""Which blocks attention read: found block by block, from the first position that is wrong on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.diagnose.bench.attention import Attention, attend

TRIES = 400
"""Attention of one block's rows that is computed at most in the search."""
Block = tuple[str, int]
"""A case, and the number of a block of it."""


@dataclass(frozen=True)
class Reads:
    """For every case, which block was read in the place of each of its own."""

    attention: Attention
    size: int
    blocks: dict[str, list[Block]]

    @property
    def moved(self) -> list[tuple[Block, Block]]:
        """Blocks and those that were read for them."""
        pairs = [((c, n), b) for c, blocks in self.blocks.items() for n, b in enumerate(blocks)]
        return [(own, read) for own, read in pairs if own != read]

    @property
    def any_moved(self) -> bool:
        """Whether any block was read for another."""
        return bool(self.moved)

    @property
    def foreign(self) -> bool:
        """Whether most of them are of other cases."""
        return 2 * sum(own[0] != read[0] for own, read in self.moved) > len(self.moved)

    def words(self) -> str:
        """The first of them, as a label."""
        (case, number), (whose, read) = self.moved[0]
        other = f"block {read}" + (f" of {whose}" if whose != case else "")
        return f"with {other} read for block {number} of {case} ({len(self.moved)} such blocks of {self.size})"

    def predict(self, case: str) -> torch.Tensor:
        """The scene's point, of attention over these blocks; NaN where they are not long enough."""
        attention = self.attention
        query = attention.turned(case)[0]
        key, value = gathered(attention, self.size, self.blocks[case], len(query))
        core = attention.core
        return attention.predict(case, attend(query, key, value, core=core, mask=core.sees))


def reads_of(attention: Attention, size: int) -> Reads:
    """The blocks with which the candidate's rows come out; a case's own where none do better."""
    return attention.once("reads", size, lambda: _reads_of(attention, size))  # type: ignore[no-any-return]


def gathered(attention: Attention, size: int, blocks: list[Block], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a list of blocks, ``length`` positions; NaN beyond the end of a block's case."""
    found = []
    for which in (1, 2):
        parts = []
        for case, number in blocks:
            rows = attention.turned(case)[which][number * size : (number + 1) * size]
            pad = rows.new_full((size - len(rows), *rows.shape[1:]), torch.nan)
            parts.append(torch.cat((rows, pad)))
        found.append(torch.cat(parts)[:length])
    return found[0], found[1]


def _reads_of(attention: Attention, size: int) -> Reads:
    scene = attention.scene
    every = [(c, n) for c in scene.reference_capture.cases for n in range(-(-scene.length(c) // size))]
    found: dict[str, list[Block]] = {}
    left = TRIES
    for case in scene.cases:
        own = [(case, n) for n in range(-(-scene.length(case) // size))]
        for number in range(len(own)):
            if _wrong(attention, size, case, own, number) > scene.allowed.position and left > 0:
                tried = [b for b in every if b != own[number]][:left]
                left -= len(tried)
                errors = {
                    b: _wrong(attention, size, case, [*own[:number], b, *own[number + 1 :]], number) for b in tried
                }
                best = min(errors, key=errors.__getitem__, default=own[number])
                if errors.get(best, 1.0) <= scene.allowed.position:
                    own[number] = best
                else:
                    break
        found[case] = own
    return Reads(attention, size, found)


def _wrong(attention: Attention, size: int, case: str, blocks: list[Block], number: int) -> float:
    """Relative error of the rows of one block, over keys up to its end; infinite where nothing can be said of them."""
    scene = attention.scene
    rows = slice(number * size, min((number + 1) * size, scene.length(case)))
    query = attention.turned(case)[0][rows]
    key, value = gathered(attention, size, blocks[: number + 1], rows.stop)
    context = attend(query, key, value, core=attention.core, mask=attention.core.sees, first=rows.start)
    right = scene.reference(attention.context, case)[rows]
    theirs = scene.candidate(attention.context, case)[rows] if attention.context in scene.rules else None
    if theirs is None:
        return 0.0
    said = context.isfinite().all(1) & theirs.isfinite().all(1)
    if not said.any():
        return float("inf")
    return float((theirs - context)[said].norm() / right[said].norm().clamp_min(1e-30))
