"""Tensors in what modules are handed and give: tuples, lists, mappings and dataclasses, one within the other."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch


def exchange(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """``value`` with ``new`` wherever it holds the object ``old``; tuples, lists, mappings and dataclasses are copied.

    >>> a, b = torch.zeros(1), torch.ones(1)
    >>> exchange(([a, 2], {"x": a}), a, b)
    ([tensor([1.]), 2], {'x': tensor([1.])})
    """
    if value is old:
        return new
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key, part in value.items():
            changed[key] = exchange(part, old, new)
        return changed
    if isinstance(value, tuple | list):
        parts = [exchange(part, old, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: exchange(getattr(value, f.name), old, new) for f in fields(value)})
    return value


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in a tensor, tuple, list, mapping or dataclass output; None if there is none."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    return next((t for part in parts_of(value) if (t := first_tensor(part)) is not None), None)


def parts_of(value: Any) -> Iterable[Any]:
    """What a mapping, tuple, list or dataclass holds; nothing for anything else."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in fields(value)]
    return ()
