"""Watching a KV cache step by step: what has changed is held against what may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from paritykit.engines.shelf import KnownShelf, Shelf, Wrong
from paritykit.engines.strays import Access, Stray, Watched, shared_blocks


class SlotWatch:
    """From ``SlotWatch(shelves)``, made when every block holds the same, to ``finish()``."""

    def __init__(self, shelves: Iterable[Shelf], *, rank: int = 0, unwatched: Mapping[str, str] | None = None) -> None:
        self._rank = rank
        self._kept = [KnownShelf(s) for s in shelves]
        self._steps = 0
        self._strays: list[Stray] = []
        self._unwatched = dict(unwatched or {})

    def adopt(self, blocks: Iterable[int], *, size: int, group: int = 0) -> None:
        """What these blocks of ``size`` positions hold now is right: the engine copied or cleared them on purpose."""
        for kept in self._of(group):
            kept.adopt(kept.own_blocks(blocks, size))

    def refill(self, live: Mapping[int, Iterable[int]], *, sizes: Mapping[int, int]) -> None:
        """Fill every block again that no request has any more; ``live`` are blocks in use, by group."""
        for kept in self._kept:
            groups = kept.shelf.groups & live.keys()
            kept.refill(set().union(*(kept.own_blocks(live[g], sizes[g]) for g in groups)))

    def after_step(self, accesses: Sequence[Access]) -> None:
        """A step is over in which requests did this: note what has changed beside it."""
        cases = sorted({a.case for a in accesses})
        told = set[int]()
        for kept in self._kept:
            mine = [a for a in accesses if a.group in kept.shelf.groups]
            if not told & kept.shelf.groups:
                self._note(kept, _clashes(mine), cases)
            told |= kept.shelf.groups
            self._note(kept, kept.judge(mine), cases)
        self._steps += 1

    def finish(self) -> Watched:
        """All that was seen, changes since the last step among it."""
        for kept in self._kept:
            self._note(kept, kept.judge(()), [])
        layers = [n for k in self._kept for n in k.shelf.layers]
        return Watched(steps=self._steps, layers=layers, unwatched=self._unwatched, strays=self._strays)

    def _of(self, group: int) -> list[KnownShelf]:
        return [k for k in self._kept if group in k.shelf.groups]

    def _note(self, kept: KnownShelf, wrongs: Iterable[Wrong], cases: list[int]) -> None:
        self._strays += [
            Stray(
                layer=kept.shelf.layers[0],
                kind=w.kind,
                block=w.block,
                offset=w.offset,
                slots=w.slots,
                part=w.part,
                step=self._steps,
                rank=self._rank,
                cases=cases,
                owner=w.owner,
                beside=list(kept.shelf.layers[1:]),
            )
            for w in wrongs
        ]


def _clashes(accesses: Sequence[Access]) -> list[Wrong]:
    return [Wrong("shared", block, owner=other.case) for block, _, other in shared_blocks(accesses)][:1]
