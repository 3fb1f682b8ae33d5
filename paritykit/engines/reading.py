"""The plain reading of modules: a tensor, a tuple or a dataclass; the first floating tensor is what counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paritykit.captures.nested import exchange, first_tensor, parts_of
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
        others = [t for t in parts_of(output) if isinstance(t, torch.Tensor) and t is not seen.tensor]
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
