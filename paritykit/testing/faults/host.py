"""Where mistakes of scheduling are planted: the one process that says who computes what, and in which blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from paritykit.errors import UsageError
from paritykit.testing.faults.changes import Changes


class Host(ABC):
    """What both engines' schedulers share. ``llm`` is the engine's core."""

    engine: str

    def __init__(self, llm: Any, changes: Changes) -> None:
        self.llm, self.changes = llm, changes

    @abstractmethod
    def on_hit(self, wrong: Callable[[int], int]) -> None:
        """``wrong(found)`` instead of how many of a new request's positions are in the prefix cache."""

    @abstractmethod
    def forget_parents(self) -> None:
        """Let a block be known by its own tokens, without those before them."""

    @abstractmethod
    def keep_computed(self) -> None:
        """Let a preempted request go on where it was, in blocks that are new to it."""


class NanoHost(Host):
    """nano's core."""

    engine = "nano"

    def on_hit(self, wrong: Callable[[int], int]) -> None:
        """``wrong(found)`` instead of how many of a new request's positions are in the prefix cache."""
        admit = self.llm.blocks.admit
        self.changes.set(self.llm.blocks, "admit", lambda *args, **options: wrong(int(admit(*args, **options))))

    def forget_parents(self) -> None:
        """Let a block be known by its own tokens, without those before them."""
        blocks = self.llm.blocks

        def chain(right_of: Any, key: str, tokens: Any, number: int) -> bytes:
            digests = blocks._chains[key]
            held, digests[number] = digests[number], digests[0]
            try:
                found: bytes = right_of(key, tokens, number)
            finally:
                digests[number] = held
            return found

        self.changes.wrap(blocks, "_chain", chain)

    def keep_computed(self) -> None:
        """Let a preempted request go on where it was, in blocks that are new to it."""
        scheduler, held = self.llm.scheduler, dict[str, int]()

        def preempt(right_of: Any, request: Any) -> None:
            held[request.id] = request.computed
            right_of(request)

        def admit(right_of: Any, key: str, tokens: Any, **options: Any) -> int:
            found = int(right_of(key, tokens, **options))
            request = scheduler.find(key)
            if request is None or not request.preemptions:
                return found
            request.computed = held[key]
            return held[key]

        self.changes.wrap(scheduler, "preempt", preempt)
        self.changes.wrap(self.llm.blocks, "admit", admit)


class VllmHost(Host):
    """vLLM's engine core, where it runs in the engine's own process: on one rank."""

    engine = "vllm"

    @property
    def scheduler(self) -> Any:
        """The scheduler."""
        return self.llm.scheduler

    def on_hit(self, wrong: Callable[[int], int]) -> None:
        """``wrong(found)`` instead of how many of a new request's positions are in the prefix cache."""

        def computed(right_of: Any, request: Any) -> Any:
            blocks, found, *rest = right_of(request)
            return blocks, min(wrong(found), request.num_tokens - 1), *rest

        self.changes.wrap(self.scheduler.kv_cache_manager, "get_computed_blocks", computed)

    def forget_parents(self) -> None:
        """Let a block be known by its own tokens, without those before them."""
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import hash_block_tokens

        config = self.llm.vllm_config.cache_config
        digest, size = get_hash_fn_by_name(config.prefix_caching_hash_algo), config.block_size

        def hashes(right_of: Any, request: Any) -> list[Any]:
            known = len(request.block_hashes)
            numbers = range(known, known + len(right_of(request)))
            return [hash_block_tokens(digest, None, request.all_token_ids[n * size : (n + 1) * size]) for n in numbers]

        self.changes.wrap(self.llm, "request_block_hasher", hashes)

    def keep_computed(self) -> None:
        """Let a preempted request go on where it was, in blocks that are new to it."""

        def preempt(right_of: Any, request: Any, *args: Any, **options: Any) -> None:
            held = request.num_computed_tokens
            right_of(request, *args, **options)
            request.num_computed_tokens = held

        self.changes.wrap(self.scheduler, "_preempt_request", preempt)


def host_of(engine: Any, changes: Changes) -> Host:
    """Where an open engine schedules. UsageError where that is in another process, or not an engine to plant in."""
    if type(engine).__name__ == "NanoEngine":
        return NanoHost(engine.llm, changes)
    if type(engine).__name__ != "VllmEngine":
        raise UsageError(f"faults of scheduling are planted in engines nano and vllm, not in {type(engine).__name__}")
    core = getattr(engine._llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        raise UsageError("vLLM on several ranks schedules in a process of its own, where no fault can be planted")
    return VllmHost(core, changes)
