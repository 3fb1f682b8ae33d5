"""From what a parameter held after each pass to the boxes it was filled from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from paritykit.provenance.boxes import Box, find_boxes
from paritykit.provenance.changes import UNDO, forward
from paritykit.provenance.codes import Coding
from paritykit.provenance.landings import to_landings
from paritykit.provenance.sources import FIRST, Source
from paritykit.provenance.weightmap import Gap, Landing, Unfilled

UNWRITTEN, CONSTANT, UNKNOWN = -1, -2, -3
NEAR = 0.02
"""How near a probe must come: what rounding leaves of it, in bfloat16 and wider, is nearer."""
KINDS: dict[int, Unfilled] = {UNWRITTEN: "unwritten", CONSTANT: "constant", UNKNOWN: "unknown"}


@dataclass(slots=True)
class Readings:
    """What a parameter held after each pass and after the probe, as float64, and where it was poison each time.

    ``slack`` is what the probe, which is no whole number, loses in the parameter's dtype.
    """

    raw: list[torch.Tensor] = field(default_factory=list)
    poisoned: torch.Tensor | None = None
    slack: float = 0.0
    probe: torch.Tensor | None = None


def add_reading(reading: Readings, tensor: torch.Tensor) -> None:
    """Keep the digits of one pass. Values that are no digit are kept as they are, to be explained."""
    values = tensor.to(torch.float64, copy=True)
    if tensor.is_floating_point():
        poisoned = values.isnan()
    else:
        poison_value = torch.empty(1, dtype=tensor.dtype)
        poison(poison_value)
        poisoned = tensor == poison_value
        reading.slack = 1.0
    reading.poisoned = poisoned if reading.poisoned is None else reading.poisoned & poisoned
    reading.raw.append(values)


def poison(tensor: torch.Tensor) -> None:
    """Fill with what no loader writes: NaN, or the lowest integer."""
    if tensor.is_floating_point():
        tensor.detach().fill_(float("nan"))
    else:
        tensor.detach().fill_(torch.iinfo(tensor.dtype).min or torch.iinfo(tensor.dtype).max)


def decode(
    name: str, reading: Readings, coding: Coding, sources: list[Source], *, probes: torch.Tensor, rank: int
) -> tuple[list[Landing], list[Gap]]:
    """The boxes of one parameter; ``probes`` is the table of ``sources``' probes."""
    addresses, labels, changes = _addresses(reading, coding, sources, probes)
    shape = tuple(reading.raw[0].shape)
    landings: list[Landing] = []
    gaps: list[Gap] = []
    for box in find_boxes(addresses.numpy().reshape(shape or (1,)), labels.numpy().reshape(shape or (1,))):
        spans = box.spans if shape else ()
        if box.label < 0:
            gaps.append(_gap(name, rank, box, reading))
            continue
        change, source = divmod(box.label, len(sources))
        tensor = sources[source]
        if not box.regular:
            gaps.append(Gap(parameter=name, rank=rank, target=spans, kind="scattered", tensor=tensor.name))
            continue
        for inside, target, axes in to_landings(box, tensor.shape):
            landings.append(
                Landing(
                    tensor=tensor.name,
                    parameter=name,
                    rank=rank,
                    source=inside,
                    target=target if shape else (),
                    axes=axes if shape else (),
                    change=changes[change],
                    copy=tensor.copy,
                )
            )
    return landings, gaps


def _gap(name: str, rank: int, box: Box, reading: Readings) -> Gap:
    value = None
    if box.label == CONSTANT:
        index = tuple(s.start for s in box.spans)
        value = float(reading.raw[0].reshape(reading.raw[0].shape or (1,))[index])
    return Gap(
        parameter=name,
        rank=rank,
        target=box.spans if reading.raw[0].dim() else (),
        kind=KINDS[box.label],
        value=value,
    )


def _addresses(
    reading: Readings, coding: Coding, sources: list[Source], probes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Flat offset and label of every element: the source's number, plus a multiple of their count for each change.

    Large digits can come through a change as they were (softplus, an offset lost in rounding): the probe tells.
    """
    raw = [r.reshape(-1) for r in reading.raw]
    changes: list[str] = []
    offsets = torch.zeros(raw[0].numel(), dtype=torch.int64)
    labels = torch.full_like(offsets, UNKNOWN)
    assert reading.poisoned is not None
    assert reading.probe is not None
    labels[reading.poisoned.reshape(-1)] = UNWRITTEN
    for change, undo in UNDO.items():
        places = (labels == UNKNOWN).nonzero().reshape(-1)
        if not len(places):
            break
        found = coding.join([_digit(undo(r[places])) for r in raw])
        source, offset, known = _look_up(found, sources)
        expected = forward(change)(probes[found.clamp(0, len(probes) - 1)].to(torch.float64))
        allowed = reading.slack + max(NEAR, 2.0**-coding.bits) * (expected.abs() + 1)
        known &= (reading.probe.reshape(-1)[places] - expected).abs() <= allowed
        if known.any():
            offsets[places[known]] = offset[known]
            labels[places[known]] = len(changes) * len(sources) + source[known]
            changes.append(change)
        if not change:
            labels[_constant(labels, reading)] = CONSTANT
    return offsets, labels, changes


def _constant(labels: torch.Tensor, reading: Readings) -> torch.Tensor:
    """Where the same number was found after every pass, and it is nobody's address."""
    assert reading.probe is not None
    all_ = [r.reshape(-1) for r in (*reading.raw, reading.probe)]
    same = torch.stack([r == all_[0] for r in all_[1:]]).all(0)
    return (labels == UNKNOWN) & same


def _digit(values: torch.Tensor) -> torch.Tensor:
    whole = values.isfinite() & (values == values.round()) & (values.abs() < 2**52)
    return torch.where(whole, values.nan_to_num(-1), -1.0).to(torch.int64)


def _look_up(addresses: torch.Tensor, sources: list[Source]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source number, flat offset, and whether the address is anybody's."""
    starts = torch.tensor([s.start for s in sources] or [0])
    sizes = torch.tensor([s.size for s in sources] or [0])
    source = (torch.searchsorted(starts, addresses, right=True) - 1).clamp_min(0)
    offset = addresses - starts[source]
    return source, offset, (addresses >= FIRST) & (offset >= 0) & (offset < sizes[source])
