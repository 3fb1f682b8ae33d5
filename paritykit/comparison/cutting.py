"""Kernels that cut what they store where others round it to nearest: told from a wrong factor, and put back.

A number that is cut loses half a unit in its last place on average, whatever its mantissa; a number that is scaled
loses more of these units the larger its mantissa is. So the error in units of the last place, over the mantissa, is a
line: its height at zero is what was cut, its slope the factor. vLLM's rotary kernel cuts keys so on a CPU without
bfloat16 instructions.
"""

from __future__ import annotations

import torch

from paritykit.comparison.precision import last_place

MOST = 1.0
"""Units in the last place that two cuts lose on average; of more than that something else is wrong."""
PLAUSIBLE = 4.0
"""Errors beyond so many units are not of storing: sums that cancel have larger ones."""
LEAST = 64
"""Numbers that a line is laid through at least."""


class CutMeter:
    """Measures what a candidate lost by cutting, fed span by span."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sums = torch.zeros(5, dtype=torch.float64)

    def update(self, truth: torch.Tensor, candidate: torch.Tensor) -> None:
        """Measure more rows of one shape."""
        wide = truth.to(torch.float64)
        unit = last_place(wide, self._dtype)
        mantissa, lost = wide.abs() / unit, (wide - candidate.to(torch.float64)) * wide.sign() / unit
        kept = (wide != 0) & (lost.abs() <= PLAUSIBLE)
        x, y = mantissa[kept], lost[kept]
        self._sums += torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum(), (x * x).sum(), (x * y).sum()]).cpu()

    def result(self) -> float:
        """Units in the last place that were lost by cutting, on average, from 0 to ``MOST``."""
        count, x, y, xx, xy = self._sums.tolist()
        spread = count * xx - x * x
        if count < LEAST or spread <= 0:
            return 0.0
        found: float = (y * xx - x * xy) / spread
        return min(max(found, 0.0), MOST)


def put_back(candidate: torch.Tensor, lost: float, dtype: torch.dtype) -> torch.Tensor:
    """``candidate`` in float64, each number larger by so many units in its last place in ``dtype``."""
    wide = candidate.to(torch.float64)
    return wide + wide.sign() * lost * last_place(wide, dtype)
