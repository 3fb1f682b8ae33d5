"""Following weights while they are loaded: every operation on memory is seen, and what it moves is written down.

Nothing is loaded twice and no tensor is made up: the checkpoint's own tensors go through the engine's own loader, while
a dispatch mode of torch notes which places each copy fills from which. Views need no notes: they are strided layouts of
the memory that they look at. Whether the numbers arrived is compared afterwards, byte for byte, so that a copy that
nobody saw is found out.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from paritykit.provenance.boxes import Box
from paritykit.provenance.operations import EMPTY, MOVES, Call, Step, copied_by, joined, moved, step_of, whole
from paritykit.provenance.pieces import CONSTANT, Contents, Layout, plain
from paritykit.provenance.sources import Source


class Region(NamedTuple):
    """A stretch of memory: its first byte, one past its last, bytes of an element, and what it holds."""

    start: int
    stop: int
    width: int
    contents: Contents


class Origin(NamedTuple):
    """What a label stands for: a tensor as it was handed over, and what was done to its numbers since.

    ``regular`` is false for elements in no order; ``lost`` names the tensors that were mixed in a way that is not
    followed.
    """

    source: int
    steps: tuple[Step, ...] = ()
    regular: bool = True
    lost: tuple[int, ...] = ()


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use as a context around loading; ``give`` every tensor that the loader is handed."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: list[Source] = []
        self.origins: list[Origin] = []
        self._labels: dict[Origin, int] = {}
        self._copies: dict[str, int] = {}
        self._starts: list[int] = []
        self._regions: dict[int, Region] = {}
        self.error = ""
        self._scalar: tuple[float, list[Box]] | None = None
        for tensor in parameters:
            if _readable(tensor) and self._region(tensor) is None:
                self._put(tensor)

    def give(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself, known as the checkpoint's ``name`` from now on."""
        copy = self._copies.get(name, 0)
        self._copies[name] = copy + 1
        self.sources.append(Source(name, copy, tuple(tensor.shape), tensor.dtype, 0))
        if _readable(tensor):
            region = self._put(tensor)
            label = self._label(Origin(len(self.sources) - 1))
            box = whole(tensor.shape, label)[0]._replace(strides=plain(tensor.shape).strides)
            region.contents.write(_layout(tensor, region.start), [box])
        return tensor

    def held(self, tensor: torch.Tensor) -> list[Box]:
        """What a tensor holds now, as boxes of its places."""
        region = self._region(tensor)
        if region is None:
            return whole(tensor.shape, CONSTANT)
        if region.width != tensor.element_size():
            return whole(tensor.shape, self._lost(region.contents.labels))
        return region.contents.read(_layout(tensor, region.start))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry ``func`` out, and note what it moved."""
        del types
        call = Call(func, args, kwargs or {})
        plan = self._tried(lambda: self._plan(call)) if not self.error else None
        output = func(*call.args, **call.kwargs)
        if not self.error:
            self._tried(lambda: self._note(call, plan, output))
        return output

    def _tried(self, look: Callable[[], Any]) -> Any:
        """What ``look`` gives. An error of ours ends the following, never the loading."""
        try:
            return look()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            self.error = f"following the loader failed: {type(error).__name__}: {error}"
            return None

    def _note(self, call: Call, plan: list[Box] | None, output: Any) -> None:
        memory = {t.untyped_storage().data_ptr() for t in call.inputs if _readable(t)}
        made = [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and _readable(t)]
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in memory]
        if call.name == "_local_scalar_dense" and self._follows(call.args[0]):
            self._scalar = (float(output), self.held(call.args[0]))
        for target in fresh:
            self._put(target)
        written = [t for t in call.written if _readable(t)]
        for target in written or fresh:
            self._write(target, self._boxes(call, target, plan, fresh=not written))

    def _plan(self, call: Call) -> list[Box] | None:
        """What the operation will write, by what its inputs hold now; None where that is not known."""
        followed = [t for t in call.inputs if self._follows(t)]
        if not followed:
            return None
        copied = copied_by(call)
        if copied is not None:
            return self.held(copied)
        if call.name in ("cat", "stack"):
            return joined(call, self.held)
        if call.name in MOVES:
            return moved(call, self.held)
        step = step_of(call, followed[0]) if call.pointwise and len({id(t) for t in followed}) == 1 else None
        return None if step is None else [self._stepped(b, step) for b in self.held(followed[0])]

    def _stepped(self, box: Box, step: Step) -> Box:
        if box.label < 0:
            return box
        origin = self.origins[box.label]
        if origin.lost:
            return box
        return box._replace(label=self._label(origin._replace(steps=(*origin.steps, step))))

    def _boxes(self, call: Call, target: torch.Tensor, plan: list[Box] | None, *, fresh: bool) -> list[Box]:
        if plan is not None:
            return plan
        mixed = [t for t in call.inputs if t is not target or call.pointwise]
        labels = {label for t in mixed if (r := self._region(t)) is not None for label in r.contents.labels}
        if labels:
            return whole(target.shape, self._lost(labels))
        if fresh and call.name in EMPTY:
            return []
        if call.name == "fill_" and self._scalar is not None:
            value, boxes = self._scalar
            if value and not isinstance(call.args[1], torch.Tensor) and float(call.args[1]) == value:
                return [Box(whole(target.shape, 0)[0].spans, boxes[0].label, boxes[0].base, (0,) * target.dim())]
        return whole(target.shape, CONSTANT)

    def _write(self, target: torch.Tensor, boxes: list[Box]) -> None:
        region = self._region(target)
        if region is None:
            return
        if region.width != target.element_size():
            labels = region.contents.labels | {b.label for b in boxes if b.label >= 0}
            size = region.contents.size
            region.contents.write(plain((size,)), whole((size,), self._lost(labels)))
            return
        region.contents.write(_layout(target, region.start), [self._regular(b) for b in boxes])

    def _regular(self, box: Box) -> Box:
        if box.regular or box.label < 0:
            return box
        origin = self.origins[box.label]._replace(regular=False)
        return box._replace(label=self._label(origin), regular=True)

    def _follows(self, tensor: torch.Tensor) -> bool:
        region = self._region(tensor)
        return region is not None and bool(region.contents.labels)

    def _lost(self, labels: Iterable[int]) -> int:
        """The label of a mixture; of nothing that is followed it is a constant."""
        found = {s for label in labels for s in self.origins[label].lost or (self.origins[label].source,)}
        lost = tuple(sorted(found))
        return self._label(Origin(lost[0], lost=lost)) if lost else CONSTANT

    def _label(self, origin: Origin) -> int:
        if origin not in self._labels:
            self._labels[origin] = len(self.origins)
            self.origins.append(origin)
        return self._labels[origin]

    def _region(self, tensor: torch.Tensor) -> Region | None:
        if not _readable(tensor) or not tensor.numel():
            return None
        place = tensor.data_ptr()
        at = bisect.bisect_right(self._starts, place) - 1
        region = self._regions[self._starts[at]] if at >= 0 else None
        return region if region is not None and place < region.stop else None

    def _put(self, tensor: torch.Tensor) -> Region:
        """Forget what was known of the tensor's memory, and begin anew."""
        memory = tensor.untyped_storage()
        start, stop = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        low = max(bisect.bisect_right(self._starts, start) - 1, 0)
        while low < len(self._starts) and self._starts[low] < stop:
            if self._regions[self._starts[low]].stop > start:
                del self._regions[self._starts[low]]
                del self._starts[low]
            else:
                low += 1
        width = tensor.element_size()
        region = Region(start, stop, width, Contents(memory.nbytes() // width))
        if stop > start:
            bisect.insort(self._starts, start)
            self._regions[start] = region
        return region


def _readable(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def _layout(tensor: torch.Tensor, start: int) -> Layout:
    offset = (tensor.data_ptr() - start) // tensor.element_size()
    return Layout(offset, tuple(tensor.shape), tuple(tensor.stride()))
