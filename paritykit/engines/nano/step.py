"""One step: what the scheduler decides, and the same as tensors, handed to every module that needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import torch

T = TypeVar("T")


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one request, from position ``start``.

    ``table`` are its blocks, enough for all positions up to the chunk's end; the first ``cached`` positions are in them
    already and are not written again. ``prompt`` is its prompt's length; ``sample`` asks for the logits after the last
    token; ``label`` is the case, -1 for none.
    """

    tokens: list[int]
    start: int
    table: list[int]
    prompt: int
    sample: bool
    label: int = -1
    cached: int = 0

    @property
    def end(self) -> int:
        """Positions known once this chunk is computed."""
        return self.start + len(self.tokens)


class Plan(msgspec.Struct, frozen=True, array_like=True):
    """What to compute in one step: block copies first (source, target), then the chunks as one flat batch."""

    chunks: list[Chunk]
    copies: list[tuple[int, int]] = []


@dataclass(frozen=True, eq=False)
class Step:
    """A plan as tensors, all ``[tokens]``: ids, positions, slots in the cache, and sequence lengths as rope sees them.

    A slot of -1 is not written, as in vLLM; ``written`` are the rows with another, None for all. ``rows`` are the
    chunks' places in the flat batch.
    """

    chunks: tuple[Chunk, ...]
    rows: tuple[slice, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor
    written: torch.Tensor | None = None
    _made: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, plan: Plan, *, block_size: int, device: torch.device) -> Step:
        """The tensors of ``plan``."""
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        slots: list[int] = []
        rows: list[slice] = []
        for chunk in plan.chunks:
            rows.append(slice(len(ids), len(ids) + len(chunk.tokens)))
            ids += chunk.tokens
            positions += range(chunk.start, chunk.end)
            lengths += [max(chunk.prompt, p + 1) for p in range(chunk.start, chunk.end)]
            slots += slot_mapping(chunk.table, chunk.start, chunk.end, block_size, cached=chunk.cached)
        tokens, places, known, cells = (torch.tensor(v, device=device) for v in (ids, positions, lengths, slots))
        written = (cells >= 0).nonzero().flatten() if min(slots, default=0) < 0 else None
        return cls(tuple(plan.chunks), tuple(rows), tokens, places, known, cells, written)

    @property
    def sampled(self) -> list[int]:
        """Rows whose logits are wanted: the last of each chunk that asks for them."""
        return [r.stop - 1 for chunk, r in zip(self.chunks, self.rows, strict=True) if chunk.sample]

    def once(self, owner: object, make: Callable[[], T]) -> T:
        """What ``make`` gave when ``owner`` first asked in this step."""
        if id(owner) not in self._made:
            self._made[id(owner)] = make()
        found: T = self._made[id(owner)]
        return found


def slot_mapping(table: list[int], start: int, end: int, block_size: int, *, cached: int = 0) -> list[int]:
    """The cache slots of positions ``start`` to ``end`` of a request whose blocks are ``table``; -1 below ``cached``.

    >>> slot_mapping([7, 2], 1, 4, block_size=2)
    [15, 4, 5]
    """
    places = range(max(start, cached), end)
    return [-1] * (end - start - len(places)) + [table[p // block_size] * block_size + p % block_size for p in places]
