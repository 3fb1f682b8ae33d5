"""vLLM's requests come to an end: a batch that never ends is given up, and of one that failed nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

AT_LEAST = 1000
FOR_EACH = 20
"""Steps that are waited for each position: one computes it, and preemption has it computed again."""


@contextlib.contextmanager
def ended(engine: Any, *, positions: int) -> Iterator[None]:
    """A block in which an ``LLMEngine`` runs a batch of so many positions.

    Raises RuntimeError where it takes many more steps than those: a scheduler that has lost a request steps on for
    ever. Where the block raises, its requests are taken back, so that the next batch does not wait for them.
    """
    step, most, taken = engine.step, AT_LEAST + FOR_EACH * positions, 0

    def counted() -> Any:
        nonlocal taken
        taken += 1
        if taken > most:
            raise RuntimeError(f"no end of its requests after {most} steps")
        return step()

    engine.step = counted
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # an engine that died has none
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise
    finally:
        del engine.step
