"""The block manager: which request owns which blocks of the KV cache. Knows no tensors. Torch-free.

A block is free, or held by one or more requests (its reference count). With prefix caching a full block is known by
the hash of all tokens up to its end; it keeps its hash when it is freed, and can be revived until it is used anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

Copy = tuple[int, int]
"""Source and target block of a copy that must be made before the next write."""


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` positions each, to requests known by a key."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = False) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.references = [0] * num_blocks
        self._free: dict[int, None] = dict.fromkeys(range(num_blocks))
        self._tables: dict[str, list[int]] = {}
        self._chains: dict[str, list[bytes]] = {}
        self._hashes: dict[int, bytes] = {}
        self._cached: dict[bytes, int] = {}

    @property
    def free(self) -> list[int]:
        """The free blocks, the one to be used next first."""
        return list(self._free)

    @property
    def cached(self) -> frozenset[int]:
        """Blocks that can be found by their hash, free or not."""
        return frozenset(self._hashes)

    def table(self, key: str) -> list[int]:
        """The blocks of a request, in order of position."""
        return list(self._tables.get(key, ()))

    def blocks_for(self, length: int) -> int:
        """Blocks that ``length`` positions need."""
        return -(-length // self.block_size)

    def admit(self, key: str, tokens: Sequence[int], *, salt: int = 0) -> int:
        """Give a new request the cached blocks that its tokens begin with; returns how many tokens they hold.

        ``salt`` keeps apart what may not be shared though the tokens are the same.
        """
        self._tables[key], self._chains[key] = [], [salt.to_bytes(8, "little")]
        for number in range(len(tokens) // self.block_size if self.prefix_caching else 0):
            digest = self._chain(key, tokens, number)
            block = self._cached.get(digest)
            if block is None:
                break
            self._hold(block)
            self._tables[key].append(block)
            self._chains[key].append(digest)
        return len(self._tables[key]) * self.block_size

    def reserve(self, key: str, start: int, end: int) -> list[Copy] | None:
        """Make positions ``start`` to ``end`` of a request writable: new blocks, and copies of shared ones.

        Returns the copies to make, or None, with nothing changed, where free blocks are too few.
        """
        table = self._tables[key]
        touched = range(start // self.block_size, min(len(table), self.blocks_for(end)) if start < end else 0)
        shared = [n for n in touched if self.references[table[n]] > 1]
        new = max(0, self.blocks_for(end) - len(table))
        if len(shared) + new > len(self._free):
            return None
        for n in touched:
            if n not in shared:
                self._forget(table[n])
        copies = [(table[n], self._take()) for n in shared]
        for n, (source, target) in zip(shared, copies, strict=True):
            self._drop(source)
            table[n] = target
        table += [self._take() for _ in range(new)]
        return copies

    def seal(self, key: str, tokens: Sequence[int], computed: int) -> None:
        """Make the full blocks among a request's first ``computed`` tokens findable."""
        if not self.prefix_caching:
            return
        table, chain = self._tables[key], self._chains[key]
        for number in range(computed // self.block_size):
            if len(chain) <= number + 1:
                chain.append(self._chain(key, tokens, number))
            block, digest = table[number], chain[number + 1]
            if block not in self._hashes and digest not in self._cached:
                self._hashes[block], self._cached[digest] = digest, block

    def forget(self) -> None:
        """Let no block be found by its hash any more; who holds one keeps it."""
        for block in list(self._hashes):
            self._forget(block)

    def share(self, parent: str, child: str) -> None:
        """Let ``child`` hold all blocks of ``parent``; whoever writes first gets a copy."""
        self._tables[child], self._chains[child] = self.table(parent), list(self._chains[parent])
        for block in self._tables[child]:
            self._hold(block)

    def release(self, key: str) -> None:
        """Give up a request's blocks, the last first: a text's beginning is the likeliest to be asked for again."""
        for block in reversed(self._tables.pop(key, [])):
            self._drop(block)
        self._chains.pop(key, None)

    def _chain(self, key: str, tokens: Sequence[int], number: int) -> bytes:
        own = tokens[number * self.block_size : (number + 1) * self.block_size]
        return xxhash.xxh3_128_digest(self._chains[key][number] + array("q", own).tobytes())

    def _take(self) -> int:
        block = next(iter(self._free))
        self._forget(block)
        self._hold(block)
        return block

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self.references[block] += 1

    def _drop(self, block: int) -> None:
        self.references[block] -= 1
        if not self.references[block]:
            self._free[block] = None

    def _forget(self, block: int) -> None:
        digest = self._hashes.pop(block, None)
        if digest is not None:
            del self._cached[digest]
