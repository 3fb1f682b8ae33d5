"""Ways to run an engine: arguments of its constructor that must not change what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from paritykit.errors import UnknownNameError

CONDITIONS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "nano": {
        "block_size": (1, 3, 16, 32),
        "max_num_batched_tokens": (1, 7, 64),
        "max_num_seqs": (1, 2, 3),
        "enable_prefix_caching": (True,),
    },
    "vllm": {
        "block_size": (32, 64, 96),
        "max_num_batched_tokens": (7, 32, 64),
        "max_num_seqs": (1, 2, 3),
        "enable_prefix_caching": (True,),
    },
}
"""What is drawn where nothing else is asked for, by engine; vLLM as it is on a CPU. It starts no more ranks."""
SEQUENCES = 8
"""As many requests at once as a small budget is given where their number is not drawn."""


def conditions(engine: str = "nano", **arguments: Sequence[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of ``engine`` that change how it runs and must not change what it gives; any may be left out.

    ``arguments`` name others, or other values, under the engine's own names: ``tensor_parallel_size=(2,)``,
    ``dtype=("float32", "bfloat16")``, ``kv_cache_dtype=("fp8",)``; an empty sequence leaves one out. A failure shrinks
    to no argument but those it takes, and of each to its first value. Raises UnknownNameError for an engine of which
    nothing is known, unless ``arguments`` are given.

    >>> conditions("nano", block_size=(), pipeline_parallel_size=(2,)).validate()
    """
    if engine not in CONDITIONS and not arguments:
        raise UnknownNameError("engine with conditions of its own", engine, CONDITIONS)
    wanted = {**CONDITIONS.get(engine, {}), **arguments}
    optional = {name: st.sampled_from(values) for name, values in wanted.items() if values}
    return st.fixed_dictionaries({}, optional=optional).map(fitted)


def fitted(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` with no more requests at once than tokens in a step, which vLLM refuses.

    >>> fitted({"max_num_batched_tokens": 7})
    {'max_num_batched_tokens': 7, 'max_num_seqs': 7}
    """
    budget = arguments.get("max_num_batched_tokens")
    if budget is None:
        return arguments
    return {**arguments, "max_num_seqs": min(arguments.get("max_num_seqs", SEQUENCES), budget)}
