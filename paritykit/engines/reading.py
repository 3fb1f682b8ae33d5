"""The plain reading of modules: a tensor, a tuple or a dataclass; the first floating tensor is what counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from paritykit.captures.recorder import Seen


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
