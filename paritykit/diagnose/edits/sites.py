"""The calls that a module's code makes of torch, where each is written, and the code with some of them changed."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

TORCH = str(Path(torch.__file__).parent)
OWN = str(Path(__file__).parents[2])


class Place(NamedTuple):
    """One call in the source: two on a line are two places."""

    file: str
    line: int
    offset: int
    name: str

    @property
    def code(self) -> str:
        """The source line."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def short(self) -> str:
        """File and line, without the folder."""
        return f"{Path(self.file).name}:{self.line}"


class Called(NamedTuple):
    """A call that was seen. ``operands``: its tensors' shapes, in order; ``gives``: that of its result."""

    place: Place
    operands: tuple[torch.Size, ...]
    gives: torch.Size
    floating: bool


Act = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""What is done in place of a call: it gets torch's function and its arguments."""


class Watching(TorchFunctionMode):
    """Notes the calls that give a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Called] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry a call out, and note it."""
        del types
        given = kwargs or {}
        operands = [t for t in tree_leaves((args, dict(given))) if isinstance(t, torch.Tensor)]
        shapes, floating = tuple(t.shape for t in operands), any(t.is_floating_point() for t in operands)
        result = func(*args, **given)
        place = place_of(func, sys._getframe(1))
        if place is not None and isinstance(result, torch.Tensor):
            self.calls.append(Called(place, shapes, result.shape, floating and result.is_floating_point()))
        return result


class Editing(TorchFunctionMode):
    """Does other things in place of some calls: at each place in ``acts`` whenever it is come by."""

    def __init__(self, acts: Mapping[Place, Act]) -> None:
        super().__init__()
        self._acts = acts
        self.done = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry a call out, or what is to be done in its place."""
        del types
        place = place_of(func, sys._getframe(1))
        act = self._acts.get(place) if place is not None else None
        if act is None:
            return func(*args, **(kwargs or {}))
        self.done += 1
        return act(func, args, dict(kwargs or {}))


def place_of(func: Any, frame: FrameType | None) -> Place | None:
    """Where a call is written; None for what computes nothing, and for calls from no source file."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__") or not name:
        return None
    inner = None
    while frame is not None and frame.f_code.co_filename.startswith(TORCH):
        inner, frame = frame, frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(OWN):
        frame = inner  # a module of torch's own
    if frame is None:
        return None
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_lasti, name)
