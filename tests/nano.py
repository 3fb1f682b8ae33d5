"""Driving nano without captures, for tests: what each request was given, token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from paritykit.engines.nano.core import NanoLLM, Output
from paritykit.engines.nano.group import Group
from paritykit.engines.nano.kv import ContiguousCache
from paritykit.engines.nano.paged import PagedCache
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.step import Plan
from paritykit.engines.nano.worker import Worker


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, and lose much where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Told:
    """The tokens a request was given, and the logits behind each, ``[vocabulary]``."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self, output: Output) -> None:
        if output.token is not None and output.logits is not None:
            self.tokens.append(output.token)
            self.logits.append(output.logits)

    def error(self, other: Told) -> float:
        """The largest difference of logits, relative to the largest logit."""
        assert self.tokens == other.tokens
        mine, theirs = torch.stack(self.logits), torch.stack(other.logits)
        return float((mine - theirs).abs().max() / mine.abs().max())

    def same_bits(self, other: Told) -> bool:
        return self.tokens == other.tokens and torch.equal(torch.stack(self.logits), torch.stack(other.logits))


def drive(
    llm: NanoLLM, prompts: Iterable[tuple[int, ...]], *, between: Callable[[], None] | None = None, **options: Any
) -> list[Told]:
    """Every prompt to its end, all at once; ``between`` is called after each step."""
    told = {llm.add_request(p, **options): Told() for p in prompts}
    while llm.unfinished:
        for output in llm.step():
            told[output.id].take(output)
        if between is not None:
            between()
    return list(told.values())


def poison_free_blocks(llm: NanoLLM) -> None:
    """NaN into every block that nobody holds and that cannot be found by its hash."""
    for block in set(llm.blocks.free) - llm.blocks.cached:
        stretch = slice(block * llm.settings.block_size, (block + 1) * llm.settings.block_size)
        for cache in llm.team.worker.caches:
            assert isinstance(cache, PagedCache | ContiguousCache)
            cache.keys.poison(stretch)
            cache.values.poison(stretch)


class Room:
    """Ranks as threads of one process: what they say to each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._given: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._given[rank] = tensor
        self._barrier.wait(10)
        found = list(self._given)
        self._barrier.wait(10)
        return found


class Seat:
    """A rank's place in the room: its ``Group``."""

    def __init__(self, room: Room, rank: int) -> None:
        self.rank, self.size, self._room = rank, room.size, room

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._room.exchange(self.rank, tensor)).sum(0)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._room.exchange(self.rank, tensor), dim=-1)


def together(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """What ``work`` gives on every rank, each a thread of its own."""
    room, results = Room(size), [None] * size

    def run(rank: int) -> None:
        results[rank] = work(Seat(room, rank))

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


class ThreadTeam:
    """All ranks in this process, in the place of ``Team``: no processes to wait for."""

    def __init__(self, settings: Settings, size: int) -> None:
        shared, room = msgspec.structs.replace(settings, tensor_parallel_size=size), Room(size)
        self._workers = [Worker(shared, Seat(room, rank)) for rank in range(size)]
        self._room = room
        self.worker = self._workers[0]

    def run(self, plan: Plan) -> torch.Tensor:
        """See ``Team.run``."""
        found: torch.Tensor = together(len(self._workers), lambda group: self._workers[group.rank].run(plan))[0]
        return found

    def close(self) -> None:
        """Nothing to end."""
