"""The synthetic checkpoint: each hand-over of a tensor has addresses of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

FIRST = 1
"""The first address; 0 stays nobody's, so that zeros are padding."""


@dataclass(frozen=True, slots=True)
class Source:
    """One hand-over of a tensor: its addresses run from ``start``."""

    name: str
    copy: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def list_sources(weights: Iterable[tuple[str, torch.Tensor]]) -> list[Source]:
    """The hand-overs of one round, with their addresses; an address is left free between any two."""
    found: list[Source] = []
    copies: dict[str, int] = {}
    start = FIRST
    for name, tensor in weights:
        copy = copies.get(name, 0)
        copies[name] = copy + 1
        found.append(Source(name, copy, tuple(tensor.shape), tensor.dtype, start))
        start += found[-1].size + 1
    return found


def probe_table(sources: Iterable[Source]) -> torch.Tensor:
    """The probe of every address, in order of addresses; 0 for those that are nobody's."""
    probes = [torch.nn.functional.pad(probe_values(s).reshape(-1).float(), (0, 1)) for s in sources]
    return torch.cat([torch.zeros(FIRST), *probes])


def probe_values(source: Source) -> torch.Tensor:
    """Random numbers between 0.25 and 1.75, the same at each call and others for each source."""
    numbers = torch.rand(source.shape, generator=torch.Generator().manual_seed(source.start), dtype=torch.float64)
    return (0.25 + 1.5 * numbers).to(source.dtype)
