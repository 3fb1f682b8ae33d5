"""One judged number, and how many independent numbers errors are made of. Torch-free."""

from __future__ import annotations

import math

import msgspec

DEGREES = 25
"""Independent numbers in a row: the ratio of one row's errors scatters as if it held so many, whatever its width."""
CHANNEL_DEGREES = 64
"""Independent numbers among the channels, at most: projections on channels scatter less than rows do."""
PEAKED = 3.0
"""Squares of a few random numbers are as uneven as if they were three times fewer."""
LEAST_PART = 0.1
"""A systematic part of the error is held against this share of the whole at least: kernels have a bent of their own."""
LEAST_SCALE = 0.025, 5.0
"""A constant factor: against this share of the whole, or this many standard errors, at least."""


class Guard(msgspec.Struct, frozen=True):
    """One number of the candidate's, the noise floor's, and how many times that chance allows."""

    metric: str
    value: float
    floor: float
    chance: float

    @property
    def beyond(self) -> float:
        """The factor at which it is just kept."""
        allowed = self.chance * self.floor
        return self.value / allowed if allowed else (math.inf if self.value else 0.0)
