"""The hooks: they see every module of a model, and write what the engine's reading of them says is worth keeping.

In a run that is fed they also put another capture's rows in the place of what they saw.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from paritykit.captures.feeder import Feeder, Rows
from paritykit.captures.manifest import Segment, point_key

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: arguments by place and by name."""


class Seen(NamedTuple):
    """A tensor a module took (``port="input"``) or gave (``port=""``, or a name for what is not the module's own).

    ``owner`` is that module, where it is not the one whose hook shows the tensor.
    """

    port: str
    tensor: torch.Tensor
    owner: nn.Module | None = None


class Reading(Protocol):
    """What an engine's modules mean: which tensors of a call are points."""

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[Seen]:
        """The input worth recording, before the module runs."""
        ...

    def outputs(self, module: nn.Module, output: Any) -> Iterable[Seen]:
        """The outputs worth recording."""
        ...

    def put_input(self, module: nn.Module, call: Call, seen: Seen, tensor: torch.Tensor) -> Call:
        """The call with ``tensor`` in the place of the input that was ``seen``; nothing is written in place."""
        ...

    def put_output(self, module: nn.Module, output: Any, seen: Seen, tensor: torch.Tensor) -> Any:
        """The output with ``tensor`` in the place of what was ``seen`` of it; nothing is written in place.

        None where more goes out than that tensor, so that replacing it would be half the matter.
        """
        ...


class Part(Protocol):
    """Where what is seen goes: a ``PartWriter``, or what measures in place of writing."""

    def step(self, segments: list[Segment]) -> int:
        """Begin a forward pass whose rows are labelled by ``segments``."""
        ...

    def record(self, tensor: torch.Tensor, *, module: str, port: str, call: int, kind: str, axes: str) -> None:
        """Take a point's rows of this pass, ``[tokens, ...]``."""
        ...

    def alias(self, source: str, *, module: str, port: str, call: int, kind: str) -> None:
        """Note that a point is the very tensor last recorded as ``source``."""
        ...

    def holds(self, source: str, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` still has the bytes that were recorded as ``source`` in this pass."""
        ...

    def drop(self, module: str, port: str, reason: str) -> None:
        """Leave a point out."""
        ...


class Selection:
    """Which points are wanted: glob patterns over point keys. ``Selection()`` takes all, ``Selection(())`` none."""

    def __init__(self, patterns: Iterable[str] | None = None) -> None:
        self.patterns = None if patterns is None else tuple(patterns)
        self._names = frozenset(self.patterns or ())
        self._globs = [p for p in self._names if any(c in p for c in "*?[")]
        self._known: dict[str, bool] = {}

    def __contains__(self, key: str) -> bool:
        if self.patterns is None:
            return True
        if key not in self._known:
            self._known[key] = key in self._names or any(fnmatchcase(key, p) for p in self._globs)
        return self._known[key]

    @property
    def empty(self) -> bool:
        """True if nothing can be wanted."""
        return self.patterns == ()


class Recorder(AbstractContextManager["Recorder"]):
    """Hooks on every module of ``model``, removed on leaving the context.

    Between ``begin`` and ``end`` each call is recorded; outside of them (warm-up runs) nothing is. The tensor is
    written inside the hook, so that a later write in place cannot change what was captured. ``alias`` recognises a
    tensor that was recorded a moment ago (the same object with the same bytes) and stores it once; that torch counts no
    write in between is no proof, as collectives and custom kernels are not counted. ``keep_error`` is for engines that
    die of an exception in a hook: the first one ends the recording and stays in ``error``.
    With a ``feeder`` modules go on with what that gives in the place of what was seen of them.
    """

    def __init__(
        self,
        model: nn.Module,
        part: Part,
        *,
        reading: Reading,
        selection: Selection,
        alias: bool,
        keep_error: bool = False,
        feeder: Feeder | None = None,
    ) -> None:
        self._part = part
        self._feeder = feeder
        self._reading = reading
        self._selection = selection
        self._alias = alias
        self._names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._rows: Rows | None = None
        self._calls: dict[nn.Module, int] = {}
        self._recent: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}
        self._handles: list[Any] = []
        self._keep_error = keep_error
        self.error: Exception | None = None

    def __enter__(self) -> Recorder:
        if not self._selection.empty:
            for module in self._names:
                self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end()

    def begin(self, segments: list[Segment], rows: Rows) -> None:
        """A forward pass starts: its rows are labelled by ``segments``."""
        self._part.step(segments)
        if self._feeder is not None:
            self._feeder.begin(segments)
        self._rows = rows if self.error is None else None
        self._calls.clear()
        self._recent.clear()

    def end(self) -> None:
        """The forward pass is over."""
        self._rows = None
        self._recent.clear()

    @property
    def active(self) -> bool:
        """Whether a forward pass is being recorded."""
        return self._rows is not None

    def record(self, seen: Seen, *, module: str, kind: str, call: int = 0) -> torch.Tensor | None:
        """Write one tensor as a point of ``module`` (a path), or note that it was just written under another name.

        Returns what the engine is to go on with in its place, None for the tensor itself.
        """
        key = point_key(module, port=seen.port, call=call)
        if self._rows is None or not key:
            return None
        if key in self._selection:
            self._write(seen, key, self._rows, module=module, kind=kind, call=call)
        return None if self._feeder is None else self._feeder.value(key, seen.tensor, self._rows)

    def _write(self, seen: Seen, key: str, to_rows: Rows, *, module: str, kind: str, call: int) -> None:
        source, rows = self._recorded(seen.tensor), to_rows(seen.tensor, key)
        if source is not None and source != key and (rows is None or self._part.holds(source, rows)):
            self._part.alias(source, module=module, port=seen.port, call=call, kind=kind)
            return
        if rows is None:
            self._part.drop(module, seen.port, f"its shape {list(seen.tensor.shape)} has no token axis")
            return
        axes = "tokens, " + ", ".join(["features"] if rows.dim() == 2 else [f"axis{i}" for i in range(1, rows.dim())])
        self._part.record(rows, module=module, port=seen.port, call=call, kind=kind, axes=axes)
        self._remember(seen.tensor, key)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run recording code of a hook; with ``keep_error``, its first failure ends the recording instead."""
        try:
            yield
        except (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            self._rows = None
            if not self._keep_error:
                raise
            self.error = self.error or error

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Torch goes on with what a hook returns, where that is not None."""
        changed: Call | None = None
        if self._rows is not None:
            with self.guard():
                for seen in self._reading.inputs(module, args, kwargs):
                    given = self._record(seen, module)
                    if given is not None:
                        changed = self._reading.put_input(module, changed or (args, kwargs), seen, given)
        return changed

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del args
        changed = None
        if self._rows is not None:
            with self.guard():
                for seen in self._reading.outputs(module, output):
                    given = self._record(seen, module)
                    if given is not None:
                        changed = self._reading.put_output(module, output, seen, given)
                        if changed is None and self._feeder is not None:
                            self._feeder.refuse(self._key(seen, module))
            self._calls[module] = self._calls.get(module, 0) + 1
        return changed

    def _record(self, seen: Seen, module: nn.Module) -> torch.Tensor | None:
        owner = module if seen.owner is None else seen.owner
        name, call = self._place(owner)
        return self.record(seen, module=name, kind=type(owner).__name__, call=call)

    def _key(self, seen: Seen, module: nn.Module) -> str:
        name, call = self._place(module)
        return point_key(name, port=seen.port, call=call)

    def _place(self, module: nn.Module) -> tuple[str, int]:
        """Path and call number. One object under several paths (a shared activation) is called once for each."""
        names, call = self._names[module], self._calls.get(module, 0)
        return (names[call], 0) if len(names) > 1 and call < len(names) else (names[0], call)

    def _recorded(self, tensor: torch.Tensor) -> str | None:
        held = self._recent.get(id(tensor)) if self._alias else None
        if held is None or held[0]() is not tensor or held[1] != _version(tensor):
            return None
        return held[2]

    def _remember(self, tensor: torch.Tensor, key: str) -> None:
        if self._alias and not tensor.is_inference():
            self._recent[id(tensor)] = (weakref.ref(tensor), tensor._version, key)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
