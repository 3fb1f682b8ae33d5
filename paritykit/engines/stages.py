"""Engines whose ranks do not all have the same modules: what they say, put together. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def merge_facts(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all ranks as one, in order of rank: lists and tables joined, of anything else the first.

    Where ranks say different things under one name, the first that says it counts.
    """
    merged: dict[str, Any] = {}
    for facts in ranks:
        for name, found in facts.items():
            held = merged.setdefault(name, found)
            if isinstance(held, dict):
                merged[name] = held | {k: v for k, v in found.items() if k not in held}
            elif isinstance(held, list):
                merged[name] = list(dict.fromkeys([*held, *found]))
    return merged
