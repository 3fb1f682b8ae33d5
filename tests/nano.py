"""Driving nano without captures, for tests: what each request was given, token by token."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from paritykit.engines.nano.core import NanoLLM, Output
from paritykit.engines.nano.group import Alone, Group
from paritykit.engines.nano.kv import ContiguousCache
from paritykit.engines.nano.paged import PagedCache
from paritykit.engines.nano.place import Place
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.stage import Stage
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
        for cache in (c for worker in getattr(llm.team, "workers", [llm.team.worker]) for c in worker.caches):
            assert isinstance(cache, PagedCache | ContiguousCache)
            cache.keys.poison(stretch)
            cache.values.poison(stretch)


class Room:
    """Ranks as threads of one process: what they say to each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.letters: dict[tuple[int, int], queue.SimpleQueue[torch.Tensor]] = {
            (source, to): queue.SimpleQueue() for source in range(size) for to in range(size)
        }
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

    def send(self, tensor: torch.Tensor, *, to: int) -> None:
        self._room.letters[self.rank, to].put(tensor.clone())

    def receive(self, empty: torch.Tensor, *, source: int) -> torch.Tensor:
        found = self._room.letters[source, self.rank].get(timeout=10)
        assert (found.shape, found.dtype, found.device) == (empty.shape, empty.dtype, empty.device)
        return found

    def connect(self) -> None:
        """Threads of one room have met."""

    def disconnect(self) -> None:
        """They leave with it."""


def together(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """What ``work`` gives on every rank, each a thread of its own."""
    room, results = Room(size), [None] * size
    cores = torch.get_num_threads()

    def run(rank: int) -> None:
        torch.set_num_threads(cores)  # a new thread begins with as many as there are
        results[rank] = work(Seat(room, rank))

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


class ThreadTeam:
    """All ranks in this process, in the place of ``Team``: no processes to wait for."""

    def __init__(self, settings: Settings, size: int, *, stages: int = 1) -> None:
        shared = msgspec.structs.replace(settings, tensor_parallel_size=size, pipeline_parallel_size=stages)
        world = Room(size * stages)
        rooms = [Room(size) if size > 1 else None for _ in range(stages)]
        self.workers = []
        for rank in range(size * stages):
            room = rooms[rank // size]
            group = Alone() if room is None else Seat(room, rank % size)
            self.workers.append(Worker(shared, Place(Stage(rank // size, stages), group, Seat(world, rank))))
        self.worker = self.workers[0]

    def run(self, plan: Plan) -> torch.Tensor:
        """See ``Team.run``."""
        found: torch.Tensor = together(len(self.workers), lambda group: self.workers[group.rank].run(plan))[0]
        return found

    def close(self) -> None:
        """Nothing to end."""
