"""The arguments that vLLM really runs with: it overrides some of those it is given, and says so in its log only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = {
    "block_size": "cache_config",
    "enable_prefix_caching": "cache_config",
    "max_model_len": "model_config",
    "max_num_batched_tokens": "scheduler_config",
    "max_num_seqs": "scheduler_config",
}
"""Arguments that are always told, and the part of vLLM's config that holds them."""
PARTS = (*dict.fromkeys(SHOWN.values()), "parallel_config", "load_config")
RENAMED = {"kv_cache_dtype": "cache_dtype"}
"""Arguments whose attribute has another name."""
PLAIN = (bool, int, float, str)


def effective_arguments(config: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config`` (a ``VllmConfig``) holds for each argument of ``asked`` and those always told.

    An argument that it does not hold as a plain value is as it was asked for.
    """
    shown = {name: getattr(getattr(config, part), name) for name, part in SHOWN.items()}
    return {**{name: _effective(config, name, value) for name, value in asked.items()}, **shown}


def _effective(config: Any, name: str, asked: Any) -> Any:
    attribute = RENAMED.get(name, name)
    for part in PARTS:
        found = getattr(getattr(config, part, None), attribute, None)
        if isinstance(found, PLAIN) and isinstance(asked, PLAIN):
            return found
    return asked
