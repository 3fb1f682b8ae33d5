"""Tiles added up, in float64, into one measurement."""

from __future__ import annotations

import math
from array import array

import numpy as np
import torch

from paritykit.comparison.measurement import Measurement
from paritykit.comparison.noise import Floats
from paritykit.comparison.nonfinite import Nonfinite
from paritykit.comparison.tile import Tile


class Totals:
    """Everything known about some rows; the totals of the next rows can be appended."""

    def __init__(self, rows: int = 0, features: int = 0) -> None:
        self.rows = rows
        self.count = rows * features
        self._spans: list[Floats] = [np.zeros((3, rows))]  # reference squares, difference squares, mismatches
        self._sums = np.zeros(5)  # candidate squares, product, difference, magnitude, beyond
        self._peaks = np.zeros(2)  # |reference|, ulp
        self._largest = 0.0
        self._at = (0, 0)
        self._values = (0.0, 0.0)
        self._nonfinite = np.zeros(4, dtype=np.int64)  # reference, candidate, mismatch, left out

    def add(self, tile: Tile, reference: torch.Tensor, candidate: torch.Tensor, *, row: int, column: int) -> None:
        """Add a tile that begins at ``row`` and ``column``; the tensors are the tile's own."""
        span = self._spans[0][:, row : row + len(tile.reference_squares)]
        span[0] += tile.reference_squares
        span[1] += tile.difference_squares
        self._sums += (tile.candidate_squares, tile.product, tile.difference, tile.magnitude, tile.beyond)
        np.maximum(self._peaks, (tile.largest_reference, tile.ulp), out=self._peaks)
        if tile.largest > self._largest:
            self._largest = tile.largest
            self._at = (row + tile.at[0], column + tile.at[1])
            self._values = (float(reference[tile.at]), float(candidate[tile.at]))

    def add_nonfinite(self, found: Nonfinite, *, row: int) -> None:
        """Add what was left out of a tile that begins at ``row``."""
        self._spans[0][2, row : row + len(found.mismatches)] += found.mismatches
        self._nonfinite += (found.reference, found.candidate, int(found.mismatches.sum()), found.left_out)

    def append(self, other: Totals) -> None:
        """Take in ``other``, whose rows follow on these."""
        if other._largest > self._largest:
            self._largest, self._values = other._largest, other._values
            self._at = (self.rows + other._at[0], other._at[1])
        self.rows += other.rows
        self.count += other.count
        self._spans += other._spans
        self._sums += other._sums
        self._nonfinite += other._nonfinite
        np.maximum(self._peaks, other._peaks, out=self._peaks)

    def measurement(self) -> Measurement:
        """The metrics. Raises ValueError where not one element was fed."""
        if not self.count:
            raise ValueError("nothing was measured: no tensor with elements was fed")
        rr, dd, mismatches = np.concatenate(self._spans, axis=1)
        candidate, product, difference, magnitude, beyond = self._sums.tolist()
        reference_norm, candidate_norm = math.sqrt(rr.sum()), math.sqrt(candidate)
        compared = max(self.count - int(self._nonfinite[3]), 1)
        return Measurement(
            rows=self.rows,
            count=self.count,
            max_abs=self._largest,
            max_abs_row=self._at[0],
            max_abs_column=self._at[1],
            max_abs_reference=self._values[0],
            max_abs_candidate=self._values[1],
            rel_l2=_ratio(math.sqrt(dd.sum()), reference_norm),
            rel_max=_ratio(self._largest, float(self._peaks[0])),
            cosine=_cosine(product, reference_norm, candidate_norm),
            norm_ratio=_ratio(candidate_norm, reference_norm, empty=1.0),
            mean_error=difference / compared,
            mean_abs=magnitude / compared,
            fraction_beyond=beyond / compared,
            nonfinite_reference=int(self._nonfinite[0]),
            nonfinite_candidate=int(self._nonfinite[1]),
            nonfinite_mismatch=int(self._nonfinite[2]),
            max_ulp=float(self._peaks[1]),
            row_rel_l2=_row_errors(rr, dd, mismatches),
        )


def _row_errors(rr: Floats, dd: Floats, mismatches: Floats) -> array[float]:
    squares = rr if rr.any() else dd  # of a reference of zeros, the difference is the candidate
    scale = np.sqrt(np.maximum(squares, 0.01 * squares.mean()))
    errors = np.divide(np.sqrt(dd), scale, out=np.zeros_like(dd), where=scale > 0)
    return array("d", np.where(mismatches > 0, np.inf, errors).tobytes())


def _ratio(value: float, over: float, *, empty: float = 0.0) -> float:
    """``value / over``; ``empty`` for 0/0, and infinite rather than NaN where sums overflowed."""
    if over == 0:
        return math.inf if value else empty
    ratio = value / over
    return math.inf if math.isnan(ratio) else ratio


def _cosine(product: float, reference_norm: float, candidate_norm: float) -> float:
    """Cosine in ``[-1, 1]``: 1 for two zero vectors, 0 for one."""
    if not reference_norm and not candidate_norm:
        return 1.0
    cosine = _ratio(product, reference_norm * candidate_norm)
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else 0.0
