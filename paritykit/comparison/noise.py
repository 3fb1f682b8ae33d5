"""A twin's and a candidate's errors against the truth: the numbers that the floor's judge goes by. Torch-free."""

from __future__ import annotations

import math
from array import array

import msgspec
import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
LEAST_ROW, LEAST_CHANNEL = 0.1, 0.5
"""A row or channel smaller than this share of the median one is measured at that share of it. Channels of activations
may be zero in all rows but one, and have then the noise of one row beside the size of one."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """One side's error ``e`` against the truth ``t``, ``[rows, features]``; all shares are of the truth's norm.

    Where the whole truth is zero, its norm, and that of each row and channel, is taken for 1.

    - ``whole``: ``||e|| / ||t||``.
    - ``scale``: ``<e, t> / <t, t>``, signed: the constant factor in the error.
    - ``row_scale``, ``channel_scale``: what of ``e`` is a factor of each row's own, or of each channel's;
      ``channel_bias`` what is an offset of each channel's own. These are norms of projections of ``e``: where ``e`` is
      random, their squares are about 1 / features, 1 / rows and 1 / rows of that of ``whole``.
    - ``sigma``: standard deviation of the elements of ``e`` over the root mean square of those of ``t``.
    - ``row``: for each row its ``||e||`` over its ``||t||``, or over a tenth of the median row's where that is more.
    - ``channel``: for each channel the same, over half of the median channel's where that is more.
    """

    whole: float
    scale: float
    row_scale: float
    channel_scale: float
    channel_bias: float
    sigma: float
    row: array[float]
    channel: array[float]


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """Twin and candidate against the truth, at one point of one case.

    ``even_rows`` and ``even_channels`` say over how many of them energy is spread: ``sum(q) ** 2 / sum(q ** 2)`` of
    their energies ``q``, all of them where these are equal and 1 where one has it all (an attention sink). Of the
    truth's energy or the twin's error's, whichever is spread over fewer.
    """

    rows: int
    features: int
    even_rows: float
    even_channels: float
    twin: Spread
    candidate: Spread

    @property
    def ratio(self) -> float:
        """The candidate's whole error over the twin's: 1 for 0/0, infinite for x/0."""
        return divide(self.candidate.whole, self.twin.whole)

    @property
    def sigma_ratio(self) -> float:
        """The same of the spread of single elements, whatever they are off by on average."""
        return divide(self.candidate.sigma, self.twin.sigma)

    @property
    def typical_ratio(self) -> float:
        """Geometric mean over rows of the candidate's error over the twin's; rows where a side is exact left out."""
        ours, theirs = np.asarray(self.candidate.row), np.asarray(self.twin.row)
        both = (ours > 0) & (theirs > 0)
        return math.exp(float(np.log(ours[both] / theirs[both]).mean())) if both.any() else 1.0

    @property
    def overlap(self) -> float:
        """How much the distributions of both sides' row errors overlap, in [0, 1]: one less the Kolmogorov distance.

        For two distributions whose densities cross once it is the common area of both.
        """
        ours, theirs = np.sort(self.twin.row), np.sort(self.candidate.row)
        both = np.concatenate((ours, theirs))
        gaps = np.abs(np.searchsorted(ours, both, side="right") - np.searchsorted(theirs, both, side="right"))
        return 1.0 - int(gaps.max(initial=0)) / max(self.rows, 1)

    def as_dict(self) -> dict[str, float]:
        """The numbers that are shown beside a candidate's metrics."""
        return {
            "floor_ratio": self.ratio,
            "sigma_ratio": self.sigma_ratio,
            "typical_ratio": self.typical_ratio,
            "overlap": self.overlap,
        }


def share_of(dots: Floats, over: Floats) -> float:
    """The norm of a projection on directions of squared length ``over``."""
    found = np.divide(dots**2, over, out=np.zeros_like(dots), where=over > 0)
    return math.sqrt(float(found.sum()))


def scales_of(squares: Floats, *, least: float) -> Floats:
    """What errors of rows or channels are held against: their truth's norm, or ``least`` of the median one's."""
    sizes = np.sqrt(squares)
    typical = median(sizes[sizes > 0]) if sizes.any() else 1 / least
    found: Floats = np.maximum(sizes, least * typical)
    return found


def median(numbers: Floats) -> float:
    """The middle one of a vector's numbers. Numpy's own takes ten times as long for a few thousand.

    >>> median(np.array([3.0, 1.0, 2.0])), median(np.array([4.0, 1.0]))
    (2.0, 2.5)
    """
    middle = len(numbers) // 2
    parted = np.partition(numbers, middle)
    upper = float(parted[middle])
    return upper if len(numbers) % 2 else (float(parted[:middle].max()) + upper) / 2


def divide(value: float, over: float, *, empty: float = 1.0) -> float:
    """``value / over``; ``empty`` for 0/0, infinite for x/0."""
    if over == 0:
        return math.inf if value else empty
    return value / over
