"""What an engine is: an adapter that runs a model on cases and is captured. A protocol; there is no base class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.results import Side

Progress = Callable[[str, int, int], None]
"""Told (what is going on, steps done, steps in all or 0 where unknown)."""


CAPABILITIES = {
    "logits": "gives point ``#logits`` for every position",
    "decode": "generates new tokens after the prompt",
    "teacher_forcing": "feeds ``case.forced``",
    "tensor_parallel": "takes ``tensor_parallel_size``",
    "pipeline_parallel": "takes ``pipeline_parallel_size``",
    "chunked_prefill": "takes ``max_num_batched_tokens`` and ``max_num_seqs``, and cuts prompts to fit",
    "prefix_caching": "takes ``enable_prefix_caching``",
    "batch_invariant": "promises the same bits for a case alone and in a batch",
    "poison": "has ``poison_cache(value)``, which fills the whole KV cache between runs",
    "cache_digest": "watches its cache in the run after ``poison_cache``; fact ``cache`` of its capture: a ``Watched``",
    "draw": "has ``draw``, which runs cases with their rounding drawn anew and measures them: see ``HFEngine``",
    "replay": "its ``run`` takes ``feed``, a ``paritykit.captures.feed.Feed`` that it carries out",
    "ledger": "has ``ledger() -> list[RankLedger]``, where its loader put every weight on each rank as it was opened",
}
"""What an engine may be capable of."""


@runtime_checkable
class Engine(Protocol):
    """An engine, opened once, run many times, closed for good. ``capabilities`` are some of ``CAPABILITIES``.

    Optional beside them: ``variations``, other constructor arguments under which it must give the same, most telling
    first, by check (``kv_cache``, ``tensor_parallel``, ``pipeline_parallel``); ``parameters()``, every rank's
    parameters by name; ``load_weights(folder)``, other weights of the same shapes.
    """

    capabilities: frozenset[str]

    def open(self) -> None:
        """Load the model. Raises EngineError if it cannot."""
        ...

    def run(self, cases: list[Case], *, points: Selection, out: Path, progress: Progress | None = None) -> Capture:
        """Run ``cases`` batch by batch, recording ``points`` into the new folder ``out``.

        Every row is labelled by (case, position). A run starts with nothing in the prefix cache. Raises EngineError
        if the engine fails.
        """
        ...

    def describe(self) -> Side:
        """The engine as it really runs: versions, dtype, device, backend."""
        ...

    def close(self) -> None:
        """Free everything: memory, processes, hooks. Safe to call twice."""
        ...


def batches(cases: list[Case]) -> list[list[Case]]:
    """The cases grouped by batch, batches in ascending order."""
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.batch, []).append(case)
    return [groups[k] for k in sorted(groups)]
