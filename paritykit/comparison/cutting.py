"""Kernels that cut what they store where others round it to nearest: told from a wrong factor, and put back.

A number that is cut loses half a unit in its last place on average, whatever its mantissa; a number that is scaled
loses more of these units the larger its mantissa is. So the error in units of the last place, over the mantissa, is a
line: its height at zero is what was cut, its slope the factor. vLLM's rotary kernel cuts keys so on a CPU without
bfloat16 instructions.
"""

from __future__ import annotations

import math

import torch

from paritykit.comparison.precision import last_place

CUTS = (0.5, 1.0)
"""Units in the last place that one cut loses on average, and two; of more than that something else is wrong."""
SURE = 5.0
"""Standard errors within which the line's height is taken for that of whole cuts: chance passes them once in 2e6. Few
numbers tell little: 192 that were cut give the height to 0.10 of a unit. Of tiny Gemma 3's keys in a short case, 879,
vLLM on a CPU without bfloat16 instructions gave 0.17 with an error of 0.11; five such points are 0.17 to 0.60."""
PLAUSIBLE = 4.0
"""Errors beyond so many units are not of storing: sums that cancel have larger ones."""
LEAST = 64
"""Numbers that a line is laid through at least."""


class CutMeter:
    """Measures what a candidate lost by cutting, fed span by span."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sums = torch.zeros(6, dtype=torch.float64)

    def update(self, truth: torch.Tensor, candidate: torch.Tensor) -> None:
        """Measure more rows of one shape."""
        wide = truth.to(torch.float64)
        unit = last_place(wide, self._dtype)
        mantissa, lost = wide.abs() / unit, (wide - candidate.to(torch.float64)) * wide.sign() / unit
        kept = (wide != 0) & (lost.abs() <= PLAUSIBLE)
        x, y = mantissa[kept], lost[kept]
        terms = (torch.ones_like(x), x, y, x * x, x * y, y * y)
        self._sums += torch.stack([t.sum() for t in terms]).cpu()

    def result(self) -> float:
        """Units in the last place that were lost by cutting: one of ``CUTS`` where the line's height may be that.

        Otherwise the height itself, from 0 to the largest of them.
        """
        count, x, y, xx, xy, yy = self._sums.tolist()
        spread = count * xx - x * x
        if count < LEAST or spread <= 0:
            return 0.0
        height = (y * xx - x * xy) / spread
        slope = (count * xy - x * y) / spread
        left = max(yy - height * y - slope * xy, 0.0) / (count - 2)
        error = math.sqrt(left * xx / spread)
        whole = min(CUTS, key=lambda cut: abs(cut - height))
        return whole if abs(whole - height) <= SURE * error else min(max(height, 0.0), CUTS[-1])


def put_back(candidate: torch.Tensor, lost: float, dtype: torch.dtype) -> torch.Tensor:
    """``candidate`` in float64, each number larger by so many units in its last place in ``dtype``."""
    wide = candidate.to(torch.float64)
    return wide + wide.sign() * lost * last_place(wide, dtype)
