"""How far apart two tensors may be, and where that number comes from. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from paritykit.errors import UnknownNameError, UsageError

ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding once to each dtype."""
FLAT = {"float64": 1e-5, "float32": 1e-5}
"""Allowed ``rel_l2`` where depth does not show: correct engines were measured at 2e-7 to 4e-6 over eleven tiny models.

float64 as float32: the reference is float64 throughout, but engines keep numbers of their own in float32 whatever their
dtype. nano's rotary tables alone put it 1.5e-6 off.
"""
GROWTH, CEILING = 3.0, 0.1
"""Half precisions: ``GROWTH`` roundings times the root of the points computed before, as independent errors add up, but
at most ``CEILING``. Correct engines were measured at 0.3 to 1.6 roundings times that root in bfloat16."""
POSITION_FACTOR = 8.0
"""One position may be this many times worse than the whole point: rows of few numbers scatter more."""


class Tolerance(msgspec.Struct, frozen=True):
    """Allowed ``rel_l2`` of a whole point, allowed worst position, and the source of both."""

    whole: float
    position: float
    source: str


def fallback(dtype: str, *, depth: int) -> float:
    """Allowed ``rel_l2`` of a point that ``depth`` points were computed before, with no noise floor to go by.

    >>> fallback("float32", depth=100)
    1e-05
    """
    if dtype in FLAT:
        return FLAT[dtype]
    return min(CEILING, GROWTH * ROUNDING[dtype] * math.sqrt(depth + 1))


def tolerance_for(
    dtypes: tuple[str, str],
    *,
    depth: int,
    overrides: Mapping[str, float] | None = None,
    source: str = "",
    reason: str = "",
) -> Tolerance:
    """The tolerance of a pair of dtypes: the user's override for the coarser one, else the fallback table.

    ``reason`` is why there is no noise floor to go by.
    """
    name = coarser(dtypes)
    if overrides and name in overrides:
        return flat(float(overrides[name]), f"tolerance.{name} ({source})")
    why = f"no noise floor: {reason}" if reason else "no noise floor measured"
    return flat(fallback(name, depth=depth), f"fallback table, {name} ({why})")


def flat(value: float, source: str) -> Tolerance:
    """The same number for the whole, and ``POSITION_FACTOR`` of it for one position."""
    return Tolerance(value, value * POSITION_FACTOR, source)


def check_overrides(overrides: Mapping[str, object]) -> dict[str, float]:
    """``overrides`` as numbers. Raises UnknownNameError for a dtype that is none, UsageError for a bad number."""
    for name, value in overrides.items():
        if name not in ROUNDING:
            raise UnknownNameError("dtype in tolerance", name, ROUNDING)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise UsageError(f"tolerance.{name} must be a number between 0 and 1, not {value!r}")
    return {k: float(v) for k, v in overrides.items()}  # type: ignore[arg-type]


def is_half(dtype: str) -> bool:
    """Whether a dtype rounds more than float32 does."""
    return ROUNDING[coarser((dtype, "float64"))] > ROUNDING["float32"]


def coarser(dtypes: tuple[str, str]) -> str:
    """The dtype with the larger rounding step; bfloat16 for any of eight bits."""
    return max((d if d in ROUNDING else "bfloat16" for d in dtypes), key=ROUNDING.__getitem__)
