"""Where weights landed: boxes of checkpoint tensors in boxes of parameters, on each rank. Torch-free.

A box is a span along each axis, so a map is small, can be read by people, and has an inverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec


class Span(msgspec.Struct, frozen=True, array_like=True):
    """``count`` places along an axis: ``start``, ``start + step``, ..."""

    start: int
    count: int
    step: int = 1

    def __str__(self) -> str:
        """As in Python: ``0:64``, ``5``, ``1:64:2``; a negative step runs downwards.

        >>> str(Span(0, 4)), str(Span(3, 1)), str(Span(1, 3, 2)), str(Span(3, 4, -1))
        ('0:4', '3', '1:6:2', '3::-1')
        """
        if self.count == 1:
            return str(self.start)
        stop = self.start + self.step * (self.count - 1) + (1 if self.step > 0 else -1)
        text = f"{self.start}:{'' if stop < 0 else stop}"
        return text if self.step == 1 else f"{text}:{self.step}"

    @property
    def low(self) -> int:
        """The lowest place."""
        return min(self.start, self.last)

    @property
    def last(self) -> int:
        """The last place, in running order."""
        return self.start + self.step * (self.count - 1)

    def places(self) -> range:
        """All places, in running order."""
        return range(self.start, self.start + self.step * self.count, self.step)


Spans = tuple[Span, ...]


def show(spans: Spans, shape: Iterable[int] = ()) -> str:
    """A box as an index, with ``:`` for a whole axis.

    >>> show((Span(0, 4), Span(0, 8)), (16, 8))
    '[0:4, :]'
    """
    sizes = [*shape, *[None] * len(spans)]
    return f"[{', '.join(':' if s == Span(0, n or 0) else str(s) for s, n in zip(spans, sizes, strict=False))}]"


def size(spans: Spans) -> int:
    """Elements in a box."""
    return math.prod(s.count for s in spans)


class Landing(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a checkpoint tensor and the box of a parameter that it filled, on one rank.

    ``axes[k]`` is the tensor's axis that runs along the parameter's axis ``k``, -1 where that has one place only.
    ``change`` is what was done to the values (``+1``, ``*2``, ``-exp``), empty for none. ``copy`` counts how often the
    loader had been handed a tensor of this name before.
    """

    tensor: str
    parameter: str
    rank: int = 0
    source: Spans
    target: Spans
    axes: tuple[int, ...]
    change: str = ""
    copy: int = 0

    @property
    def transposed(self) -> bool:
        """Whether the tensor's axes run in another order along the parameter's."""
        running = [a for a in self.axes if a >= 0]
        return running != sorted(running)


Unfilled = Literal["unwritten", "constant", "unknown", "scattered", "unfollowed"]


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A box of a parameter that no box of a tensor explains.

    ``unwritten``: the loader never touched it; ``constant``: it holds ``value`` whatever is loaded; ``unknown``: values
    that depend on the checkpoint in a way that was not found; ``scattered``: elements of ``tensor`` in no order;
    ``unfollowed``: made in part of ``tensor`` by an operation that is not followed, which proves nothing.
    """

    parameter: str
    rank: int = 0
    target: Spans
    kind: Unfilled
    value: float | None = None
    tensor: str = ""


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """One landing, its numbers compared: how many, how many differ, by how much at most, and the first that does.

    ``index`` is the first differing element's place in the checkpoint tensor, ``expected`` and ``found`` its numbers.
    """

    tensor: str
    parameter: str
    rank: int
    elements: int
    differing: int = 0
    largest: float = 0.0
    index: tuple[int, ...] = ()
    expected: float | None = None
    found: float | None = None


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint tensor as the loader was handed it, ``copies`` times."""

    shape: tuple[int, ...]
    dtype: str
    copies: int = 1


class ParameterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter, or a persistent buffer, on one rank. ``same_as``: it shares its memory with that one."""

    name: str
    rank: int = 0
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False
    same_as: str = ""


class WeightMap(msgspec.Struct, kw_only=True):
    """Where every element of a checkpoint landed, over all ranks."""

    tensors: dict[str, TensorInfo] = {}
    parameters: list[ParameterInfo] = []
    landings: list[Landing] = []
    gaps: list[Gap] = []
    ranks: int = 1

    def of_tensor(self, name: str) -> list[Landing]:
        """Where a tensor went."""
        return [x for x in self.landings if x.tensor == name]

    def of_parameter(self, name: str, *, rank: int = 0) -> list[Landing]:
        """What a parameter was filled from, in order of its places."""
        found = [x for x in self.landings if x.parameter == name and x.rank == rank]
        return sorted(found, key=lambda x: tuple(s.low for s in x.target))

    def shape(self, parameter: str, *, rank: int = 0) -> tuple[int, ...]:
        """The shape of a parameter on a rank. KeyError for none."""
        for found in self.parameters:
            if found.name == parameter and found.rank == rank:
                return found.shape
        raise KeyError(parameter)


def merge_ranks(maps: Iterable[WeightMap]) -> WeightMap:
    """One map of those of single ranks."""
    whole = WeightMap(ranks=0)
    for one in maps:
        whole.tensors |= {n: t for n, t in one.tensors.items() if n not in whole.tensors}
        whole.parameters += one.parameters
        whole.landings += one.landings
        whole.gaps += one.gaps
        whole.ranks += one.ranks
    return whole


class RankLedger(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's weights: where they landed, and whether the real numbers arrived.

    ``padding``: parameter to the first row that is padding, with the reason. ``error``: why the loader could not be
    traced. ``seconds``: what tracing and comparing took. ``stage``: the rank's stage of the pipeline; only ranks of one
    stage share layers. ``names`` (tensor to parameter and shard, as the engine's own rules say) and ``fused`` (module
    to its parts) are declared by the engine, not traced.
    """

    rank: int = 0
    stage: int = 0
    found: WeightMap
    arrived: list[Arrived] = []
    padding: dict[str, tuple[int, str]] = {}
    error: str = ""
    seconds: float = 0.0
    names: dict[str, tuple[str, str] | None] = {}
    fused: dict[str, list[dict[str, int]]] = {}
