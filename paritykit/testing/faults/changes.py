"""What a planted fault changed, so that it can be taken back exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


class Changes:
    """Attributes of single objects and values of tensors, never of modules or classes: no other engine sees them."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Give ``owner`` another value under ``name``."""
        submodule = isinstance(owner, nn.Module) and name in owner._modules
        if submodule or name in vars(owner):
            self._undo.append(partial(setattr, owner, name, getattr(owner, name)))
        else:
            self._undo.append(partial(delattr, owner, name))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Let calls of ``owner.name(...)`` go to ``around(the one before, ...)``."""
        self.set(owner, name, partial(around, getattr(owner, name)))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself, to be changed in place; its values are put back."""
        data = tensor.data
        self._undo.append(partial(data.copy_, data.clone()))
        return data

    def later(self, undo: Callable[[], object]) -> None:
        """Something else that takes a change back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Take everything back, the last first."""
        while self._undo:
            self._undo.pop()()
