"""In which dtype two tensors are compared, and what one unit in the last place is worth there."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

_NARROW_INTEGERS = frozenset({torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16})


class Precision(NamedTuple):
    """How a pair of dtypes is measured.

    ``work`` is the dtype of the arithmetic: float32 where it holds every value of both sides exactly, else float64.
    ``exponent`` masks the exponent bits of ``work``, seen as integers of dtype ``bits``. ``smallest`` and ``epsilon``
    describe the coarser dtype of the two: the spacing at ``m`` is ``max(2 ** floor(log2(m)), smallest) * epsilon``.
    Sums of squares outside ``trusted`` over- or underflow in ``work``.
    """

    work: torch.dtype
    bits: torch.dtype
    exponent: torch.Tensor
    smallest: float
    epsilon: float
    trusted: tuple[float, float]


@cache
def shared_precision(reference: torch.dtype, candidate: torch.dtype) -> Precision:
    """The precision for two dtypes. Raises ValueError for complex and quantized ones."""
    smallest, epsilon = _spacing({reference, candidate})
    if {reference, candidate} <= _NARROW_INTEGERS or all(_fits_float32(d) for d in (reference, candidate)):
        mask = torch.tensor(0x7F800000, dtype=torch.int32)
        return Precision(torch.float32, torch.int32, mask, smallest, epsilon, (1e-28, 1e36))
    return exact_precision(smallest, epsilon)


def exact_precision(smallest: float, epsilon: float) -> Precision:
    """Arithmetic in float64, for a coarser dtype with this smallest normal number and epsilon."""
    mask = torch.tensor(0x7FF0000000000000, dtype=torch.int64)
    return Precision(torch.float64, torch.int64, mask, smallest, epsilon, (0.0, float("inf")))


def _fits_float32(dtype: torch.dtype) -> bool:
    return dtype in _NARROW_INTEGERS or (dtype.is_floating_point and dtype.itemsize <= 4)


def _spacing(dtypes: set[torch.dtype]) -> tuple[float, float]:
    """Smallest normal number and epsilon of the coarsest floating dtype."""
    if any(d.is_complex or _is_quantized(d) for d in dtypes):
        raise ValueError(f"cannot compare {' with '.join(sorted(map(str, dtypes)))}: only real dtypes have metrics")
    floating = [torch.finfo(d) for d in dtypes if d.is_floating_point]
    if not floating:
        # Integers lie 1 apart: a "smallest normal" beyond all of them makes the spacing the same everywhere.
        return 2.0**64, 2.0**-64
    coarsest = max(floating, key=lambda info: info.eps)
    return coarsest.smallest_normal, coarsest.eps


def _is_quantized(dtype: torch.dtype) -> bool:
    return dtype in {torch.qint8, torch.quint8, torch.qint32}


def last_place(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place of each number, were it a normal one in ``dtype``; that of one for zero."""
    _, exponent = torch.frexp(torch.where(numbers == 0, torch.ones_like(numbers), numbers))
    return torch.ldexp(torch.full_like(numbers, torch.finfo(dtype).eps), exponent - 1)
