"""The weight map that following a loader gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from paritykit.provenance.boxes import Box
from paritykit.provenance.changes import name_change
from paritykit.provenance.follow import Follower, Origin
from paritykit.provenance.landings import to_landings
from paritykit.provenance.pieces import UNWRITTEN
from paritykit.provenance.trace import describe, tensor_infos
from paritykit.provenance.weightmap import Gap, Landing, Spans, Unfilled, WeightMap

SAMPLE = 256
"""Elements of a parameter that are looked at before and after."""
POINTS = 257
"""Numbers on which what was done to weights on the way is recognised."""


class Samples:
    """A few numbers of each parameter: what changed though no operation was seen to write it, was written unseen."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._held = {name: _sample(tensor) for name, tensor in parameters.items()}

    def changed(self, name: str, tensor: torch.Tensor, spans: Spans) -> bool:
        """Whether a box of the parameter holds other numbers than then; true for a parameter that was not there."""
        before, now = self._held.get(name), _sample(tensor)
        if before is None or before.shape != now.shape:
            return True
        index = _places(tensor.shape)
        inside = torch.ones(len(now), dtype=torch.bool)
        for place, span in zip(index, spans, strict=True):
            inside &= torch.isin(place, torch.tensor(span.places()))
        return not torch.equal(before[inside], now[inside])


def _places(shape: torch.Size) -> tuple[torch.Tensor, ...]:
    """Indices of up to ``SAMPLE`` elements, evenly spread."""
    count = shape.numel()
    return torch.unravel_index(torch.arange(0, count, max(1, count // SAMPLE)), shape) if shape else ()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Those elements as bytes, ``[elements, bytes]``."""
    taken = tensor.detach()[tuple(p.to(tensor.device) for p in _places(tensor.shape))] if tensor.dim() else tensor
    return taken.detach().reshape(-1, 1).contiguous().view(torch.uint8).cpu().clone()


def followed_map(
    follower: Follower, parameters: Mapping[str, torch.Tensor], *, rank: int, before: Samples | None = None
) -> WeightMap:
    """Where each element that was given landed in ``parameters``; ``before`` was taken before loading."""
    found = WeightMap(tensors=tensor_infos(follower.sources), parameters=describe(parameters, rank))
    names: dict[Origin, str | None] = {}
    for info in found.parameters:
        if not info.same_as:
            tensor = parameters[info.name].detach()
            reading = _Reading(follower, tensor, name=info.name, rank=rank, names=names)
            for box in follower.held(tensor):
                if box.label < 0:
                    unseen = before is not None and before.changed(info.name, tensor, box.spans)
                    found.gaps.append(reading.unfilled(box, unseen=unseen))
                else:
                    landings, gaps = reading.filled(box)
                    found.landings += landings
                    found.gaps += gaps
    return found


class _Reading:
    """One parameter, read: landings and gaps of its boxes. ``names`` keeps what changes are called."""

    def __init__(
        self, follower: Follower, tensor: torch.Tensor, *, name: str, rank: int, names: dict[Origin, str | None]
    ) -> None:
        self._follower = follower
        self._tensor = tensor
        self._place: dict[str, Any] = {"parameter": name, "rank": rank}
        self._names = names

    def unfilled(self, box: Box, *, unseen: bool) -> Gap:
        """What no tensor explains; ``unseen``: the parameter was written all the same."""
        if box.label == UNWRITTEN:
            return self._gap(box, "unfollowed" if unseen else "unwritten")
        value = float(self._tensor[tuple(s.start for s in box.spans)])
        return msgspec.structs.replace(self._gap(box, "constant"), value=value)

    def filled(self, box: Box) -> tuple[list[Landing], list[Gap]]:
        """What one tensor explains, or several of which it is not known how."""
        origin = self._follower.origins[box.label]
        source = self._follower.sources[origin.source]
        change = None if origin.lost else self._change(origin)
        if change is None:
            lost = [self._follower.sources[number].name for number in origin.lost or (origin.source,)]
            return [], [self._gap(box, "unfollowed", name) for name in lost]
        if not (origin.regular and box.regular):
            return [], [self._gap(box, "scattered", source.name)]
        alike: dict[str, Any] = {"tensor": source.name, "copy": source.copy, "change": change, **self._place}
        return [
            Landing(source=inside, target=target, axes=axes, **alike)
            for inside, target, axes in to_landings(box, source.shape)
        ], []

    def _gap(self, box: Box, kind: Unfilled, tensor: str = "") -> Gap:
        return Gap(target=box.spans, kind=kind, tensor=tensor, **self._place)

    def _change(self, origin: Origin) -> str | None:
        """What was done to numbers on the way, by name: empty for nothing, None for what has no name."""
        if not origin.steps:
            return ""
        if origin not in self._names:
            self._names[origin] = _named(origin, self._follower.sources[origin.source].dtype)
        return self._names[origin]


def _named(origin: Origin, dtype: torch.dtype) -> str | None:
    before = torch.linspace(0.25, 1.75, POINTS).to(dtype)
    after = before
    try:
        for step in origin.steps:
            after = step(after)
    except RuntimeError:
        return None
    if after.shape != before.shape:
        return None
    if torch.equal(before.to(after.dtype), after):
        return ""
    return name_change(before.to(torch.float64), after.to(torch.float64), after.dtype) or None
