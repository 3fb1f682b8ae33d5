"""A module of the reference's run again on what it was handed, with its code as it is or with an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from paritykit.captures.nested import first_tensor
from paritykit.errors import ParityError
from paritykit.mapping.transform import flat


class Rerun:
    """The calls of ``module`` on some cases, each read at once; ``texts`` are their tokens by case.

    Raises ParityError where the module is not called once for each.
    """

    def __init__(self, model: Any, module: nn.Module, texts: Mapping[str, Sequence[int]]) -> None:
        self.module = module
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        for case, tokens in texts.items():
            met: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            hook = module.register_forward_pre_hook(
                lambda _, a, k, met=met: met.append(_copied((a, k))), with_kwargs=True
            )
            try:
                model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False)
            finally:
                hook.remove()
            if len(met) != 1:
                raise ParityError(f"{type(module).__name__} is called {len(met)} times in one pass")
            self._calls[case] = met[0]
        self._length = {case: len(tokens) for case, tokens in texts.items()}

    def length(self, case: str) -> int:
        """How many positions a case has."""
        return self._length[case]

    def rows(self, case: str, edit: AbstractContextManager[Any] | None = None) -> torch.Tensor:
        """The module's output, ``[positions, features]``; raises whatever an edited module may raise."""
        args, kwargs = _copied(self._calls[case])
        with edit or nullcontext():
            tensor = first_tensor(self.module(*args, **kwargs))
        length = self._length[case]
        if tensor is None or tensor.numel() % length or length not in tensor.shape[:2]:
            raise ParityError(f"{type(self.module).__name__} gives no row for each token")
        return flat(tensor.reshape(length, -1))


def _copied(call: Any) -> Any:
    """With tensors of its own: a module may write to what it is handed."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, call)
