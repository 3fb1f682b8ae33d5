"""Carrying a weight map out: tensors to parameters, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paritykit.provenance.changes import forward
from paritykit.provenance.weightmap import Landing, Spans, WeightMap


def box(tensor: torch.Tensor, spans: Spans) -> torch.Tensor:
    """The elements of a box in running order; a view unless a span runs downwards."""
    found = tensor[upwards(spans)]
    down = [k for k, s in enumerate(spans) if s.step < 0]
    return found.flip(down) if down else found


def upwards(spans: Spans) -> tuple[slice, ...]:
    """A box as slices, every axis in ascending order."""
    return tuple(slice(s.low, max(s.start, s.last) + 1, abs(s.step)) for s in spans)


def as_source(filled: torch.Tensor, landing: Landing) -> torch.Tensor:
    """A box of the parameter with its axes in the tensor's order, and the shape of the tensor's box."""
    order = sorted((k for k, a in enumerate(landing.axes) if a >= 0), key=lambda k: landing.axes[k])
    rest = [k for k, a in enumerate(landing.axes) if a < 0]
    return filled.permute([*rest, *order]).reshape([s.count for s in landing.source])


def as_target(taken: torch.Tensor, landing: Landing) -> torch.Tensor:
    """Inverse of ``as_source``: a box of the tensor with the axes and shape of the parameter's box."""
    running = [a for a in landing.axes if a >= 0]
    order = sorted(running)
    counts = [landing.source[a].count for a in order]
    return taken.reshape(counts).permute([order.index(a) for a in running]).reshape([s.count for s in landing.target])


def scatter(found: WeightMap, tensors: Mapping[str, torch.Tensor], *, rank: int = 0) -> dict[str, torch.Tensor]:
    """What the loader makes of ``tensors``: each parameter of a rank; NaN where nothing is known to be written."""
    made: dict[str, torch.Tensor] = {}
    for info in found.parameters:
        if info.rank != rank or info.same_as:
            continue
        made[info.name] = torch.full(info.shape, float("nan"), dtype=torch.float64)
        for gap in found.gaps:
            if gap.parameter == info.name and gap.rank == rank and gap.value is not None:
                _put(made[info.name], gap.target, torch.tensor(gap.value, dtype=torch.float64))
        for landing in found.of_parameter(info.name, rank=rank):
            taken = forward(landing.change)(box(tensors[landing.tensor].to(torch.float64), landing.source))
            _put(made[info.name], landing.target, as_target(taken, landing))
    return made


def gather(found: WeightMap, name: str, parameters: Mapping[int, Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """The checkpoint tensor ``name`` read back from the parameters of every rank; NaN where it landed nowhere.

    Landings that changed the values are left out.
    """
    info = found.tensors[name]
    whole = torch.full(info.shape, float("nan"), dtype=torch.float64)
    for landing in found.of_tensor(name):
        if not landing.change:
            filled = box(parameters[landing.rank][landing.parameter].to(torch.float64), landing.target)
            _put(whole, landing.source, as_source(filled, landing))
    return whole


def consumed(found: WeightMap, name: str) -> torch.Tensor:
    """How often each element of a tensor landed, over all ranks: int16 of the tensor's shape."""
    times = torch.zeros(found.tensors[name].shape, dtype=torch.int16)
    for landing in found.of_tensor(name):
        times[upwards(landing.source)] += 1
    return times


def _put(whole: torch.Tensor, spans: Spans, values: torch.Tensor) -> None:
    down = [k for k, s in enumerate(spans) if s.step < 0]
    whole[upwards(spans)] = values.flip(down) if down else values
