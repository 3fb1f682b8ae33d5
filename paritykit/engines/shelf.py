"""Blocks of a KV cache in memory, and what they are known to hold.

A digest of each block, 64 bits, says which have changed; only those are looked at byte by byte. What a block held
before is known: the number that the cache was filled with, or what was seen when it changed last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from paritykit.engines.strays import Access, Kind

PORTION = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Bytes that are digested at once: what fits a core's cache, or keeps a GPU busy."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Shelf:
    """Tensors in which some layers keep what they cache: all have the blocks as their first axis.

    ``size`` are positions in a block, each with ``parts``. ``slots`` say for each tensor where the elements of a block
    belong, ``[elements]``: to slot ``n % size`` of part ``n // size``, or nowhere if -1. Without them only whole blocks
    are told apart. ``groups`` are those whose tables count.
    """

    layers: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    size: int
    parts: tuple[str, ...] = ("key", "value")
    slots: tuple[torch.Tensor, ...] | None = None
    groups: frozenset[int] = frozenset({0})


def row_slots(size: int, width: int, *, device: torch.device | None = None) -> torch.Tensor:
    """The slots of a plain block, ``size`` rows of ``width`` elements, ``[size * width]``."""
    return torch.arange(size, device=device).repeat_interleave(width)


@dataclass(frozen=True)
class Wrong:
    """What is wrong after a step; see ``Stray``."""

    kind: Kind
    block: int
    offset: int = -1
    slots: int = 1
    owner: int = -1
    part: str = ""


class KnownShelf:
    """A shelf whose blocks all hold the same at first, and what they hold since."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._words = tuple(t.view(WORDS[t.element_size()]) for t in shelf.tensors)
        self._filling = tuple(w[:1].clone() for w in self._words)
        self._fill = self._bytes([0])[0]
        self._rows = shelf.size if shelf.slots else 1
        self._parts = len(shelf.parts) if shelf.slots else 1
        self._places = self._slot_of_byte()
        self._factors = [_factors(w, seed=n) for n, w in enumerate(self._words)]
        self._held: dict[int, torch.Tensor] = {}
        self._digests = self._digest()

    def own_blocks(self, blocks: Iterable[int], size: int) -> set[int]:
        """Blocks of ``size`` positions in this shelf's own count: kernels may cut a block into smaller ones."""
        own = self.shelf.size
        return {n for b in blocks for n in range(b * size // own, -(-(b + 1) * size // own))}

    def adopt(self, blocks: set[int]) -> None:
        """Take what they hold as right."""
        self._hold(sorted(blocks))

    def refill(self, live: set[int]) -> None:
        """Fill all but ``live`` again."""
        freed = [b for b in self._held if b not in live]
        for words, filling in zip(self._words, self._filling, strict=True):
            for block in freed:
                words[block].copy_(filling[0])
        self._hold(freed)

    def judge(self, accesses: Sequence[Access]) -> list[Wrong]:
        """What is wrong after these, the first of each kind; what the blocks hold now is known from here on."""
        now = self._digest()
        owned = {s for a in accesses for s in a.slots()}
        touched = {s // self.shelf.size for s in owned}
        blocks = sorted(touched | set((now != self._digests).nonzero().flatten().tolist()))
        if not blocks:
            return []
        found = self._bytes(blocks)
        before = torch.stack([self._held.get(b, self._fill) for b in blocks])
        allowed = self._table(blocks, owned)
        changed, written = self._any(found != before), self._any(found != self._fill)
        self._hold(blocks, found)
        kinds: tuple[tuple[Kind, torch.Tensor], ...] = (("foreign", changed & ~allowed), ("lost", allowed & ~written))
        return [self._first(kind, blocks, wrong, accesses) for kind, wrong in kinds if wrong.any()]

    def _first(self, kind: Kind, blocks: list[int], wrong: torch.Tensor, accesses: Sequence[Access]) -> Wrong:
        slots = wrong.any(1)
        row, offset = slots.nonzero()[0].tolist()
        block, told = blocks[row], bool(self.shelf.slots)
        parts = [name for name, bad in zip(self.shelf.parts, wrong[row, :, offset].tolist(), strict=False) if bad]
        owners = (a.case for a in accesses if block in self.own_blocks(a.known_blocks(), a.size))
        return Wrong(
            kind, block, offset if told else -1, int(slots.sum()), next(owners, -1), " and ".join(parts) if told else ""
        )

    def _table(self, blocks: list[int], owned: set[int]) -> torch.Tensor:
        """Which slots of ``blocks`` are owned, bool ``[blocks, 1, slots]``."""
        row = {b: n for n, b in enumerate(blocks)}
        table = torch.zeros(len(blocks), 1, self._rows, dtype=torch.bool)
        for slot in owned:
            table[row[slot // self.shelf.size], 0, slot % self.shelf.size % self._rows] = True
        return table.to(self._fill.device)

    def _any(self, places: torch.Tensor) -> torch.Tensor:
        """Whether any byte of a slot is True, ``[blocks, parts, slots]`` of ``[blocks, bytes]``."""
        columns = self._parts * self._rows
        counts = torch.zeros(len(places), columns + 1, dtype=torch.int32, device=places.device)
        found = counts.index_add_(1, self._places, places.int())[:, :columns] > 0
        return found.view(len(places), self._parts, self._rows)

    def _slot_of_byte(self) -> torch.Tensor:
        """Which part and slot every byte of a block belongs to, ``[bytes]``: one after the last for none."""
        if self.shelf.slots is None:
            return torch.zeros_like(self._fill, dtype=torch.int64)
        sizes = [t.element_size() for t in self.shelf.tensors]
        whole = torch.cat([s.repeat_interleave(n) for s, n in zip(self.shelf.slots, sizes, strict=True)])
        return torch.where(whole < 0, self._parts * self._rows, whole).to(self._fill.device)

    def _hold(self, blocks: list[int], found: torch.Tensor | None = None) -> None:
        """Know what ``blocks`` hold now."""
        if not blocks:
            return
        for block, row in zip(blocks, self._bytes(blocks) if found is None else found, strict=True):
            if torch.equal(row, self._fill):
                self._held.pop(block, None)
            else:
                self._held[block] = row
        self._digests[blocks] = self._digest(blocks)

    def _bytes(self, blocks: list[int]) -> torch.Tensor:
        """``[blocks, bytes]`` of all tensors."""
        parts = [w[blocks].flatten(1).contiguous().view(torch.uint8) for w in self._words]
        return torch.cat(parts, dim=1)

    def _digest(self, blocks: list[int] | None = None) -> torch.Tensor:
        """A number for each block, int64: the sum of its words, each times a number of its own."""
        total: torch.Tensor | int = 0
        for words, factors in zip(self._words, self._factors, strict=True):
            some = words if blocks is None else words[blocks]
            step = max(1, PORTION.get(words.device.type, 1 << 24) // (words[0].numel() * words.element_size()))
            sums = [(_wide(some[n : n + step]) * factors).sum(1) for n in range(0, len(some), step)]
            total = total + torch.cat(sums)
        assert isinstance(total, torch.Tensor)
        return total


def _wide(words: torch.Tensor) -> torch.Tensor:
    """``[blocks, words]`` of 64 bits, as many as there are; the words as they are where these do not come out even."""
    flat = words.flatten(1).contiguous()
    even = flat.shape[1] * flat.element_size() % 8 == 0
    return flat.view(torch.int64) if even else flat.long()


def _factors(words: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Odd numbers of 64 bits, ``[words]`` of ``_wide``: no two places weigh the same."""
    count, generator = _wide(words[:1]).shape[1], torch.Generator().manual_seed(seed)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(words.device)
