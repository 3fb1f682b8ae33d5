"""The plain reading of modules: a tensor, a tuple or a dataclass; the first floating tensor is what counts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from paritykit.captures.recorder import Call, Seen


class FirstTensor:
    """Inputs are recorded for modules without children: free where the input is another module's output."""

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Seen]:
        """The first floating tensor a childless module is given."""
        if next(module.children(), None) is None:
            tensor = first_tensor((*args, *kwargs.values()))
            if tensor is not None:
                yield Seen("input", tensor)

    def outputs(self, module: nn.Module, output: Any) -> Iterator[Seen]:
        """The module's output; the logits of an output that has them."""
        del module
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor):
            yield Seen("logits", logits)
        elif (tensor := first_tensor(output)) is not None:
            yield Seen("", tensor)

    def put_input(self, module: nn.Module, call: Call, seen: Seen, tensor: torch.Tensor) -> Call:
        """See ``Reading.put_input``: wherever the call has that very tensor."""
        del module
        changed: Call = exchange(call, seen.tensor, tensor)
        return changed

    def put_output(self, module: nn.Module, output: Any, seen: Seen, tensor: torch.Tensor) -> Any:
        """See ``Reading.put_output``: wherever the output has that very tensor.

        Not where the output holds more of the same rows: a router's shares and choices follow from its logits.
        """
        del module
        others = [t for t in _parts(output) if isinstance(t, torch.Tensor) and t is not seen.tensor]
        if any(t.shape[:-1] == tensor.shape[:-1] for t in others):
            return None
        return exchange(output, seen.tensor, tensor)


def other_paths(model: nn.Module) -> dict[str, str]:
    """Path to the first path of the same module, for every module that lies under several.

    Called once, it is recorded under its first.
    """
    first: dict[nn.Module, str] = {}
    paths = ((name, first.setdefault(m, name)) for name, m in model.named_modules(remove_duplicate=False))
    return {name: own for name, own in paths if name != own}


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
    return next((t for part in _parts(value) if (t := first_tensor(part)) is not None), None)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name) for f in fields(value)]
    return ()
