"""What was measured on one aligned pair: plain numbers, without torch."""

from __future__ import annotations

from array import array

import msgspec

METRICS = {
    "max_abs": "largest absolute difference",
    "max_abs_row": "its row",
    "max_abs_column": "its column",
    "max_abs_reference": "the reference's value there",
    "max_abs_candidate": "the candidate's value there",
    "rel_l2": "norm of the difference over the reference's norm; what is judged",
    "rel_max": "largest absolute difference over the reference's largest value",
    "cosine": "cosine between both sides",
    "norm_ratio": "the candidate's norm over the reference's",
    "mean_error": "signed mean of the difference",
    "mean_abs": "mean absolute difference",
    "fraction_beyond": "share of elements further off than allowed, at the scale of their row",
    "nonfinite_reference": "NaN or Inf in the reference",
    "nonfinite_candidate": "NaN or Inf in the candidate",
    "nonfinite_mismatch": "NaN or Inf in one side only",
    "max_ulp": "largest difference in units in the last place of the coarser dtype",
    "row_rel_l2": "relative difference of each position; the worst is judged",
    "floor_ratio": "the candidate's error against the truth over that of the reference's twin: over the noise floor",
    "typical_ratio": "the same of single positions, as a geometric mean",
    "sigma_ratio": "the same of the standard deviations of the errors of single numbers",
    "overlap": "how much the distributions of both sides' errors at single positions overlap",
    "kl_mean": "mean Kullback-Leibler divergence of the next-token distribution, nats",
    "kl_max": "largest of these over positions",
    "top_k_agreement": "share of the reference's five likeliest tokens that are the candidate's too",
    "argmax_flips": "positions where the likeliest token differs",
}
"""Every metric by name, in one line each."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """How far a candidate ``c`` is from a reference ``r``, both ``[rows, features]``.

    Elements where either side is NaN or infinite are counted in the ``nonfinite_*`` fields and left out of every other
    number; means and shares are over the elements that remain. 0/0 counts as "no difference" and x/0 as infinite.

    - ``max_abs``: largest ``|c - r|``, with its row, column and both values there (the first one on a tie,
      zeros where nothing differs).
    - ``rel_l2``: ``||c - r|| / ||r||``. ``rel_max``: ``max |c - r| / max |r|``.
    - ``cosine``: between both sides taken as one vector. ``norm_ratio``: ``||c|| / ||r||``.
    - ``mean_error``: signed mean of ``c - r``. ``mean_abs``: mean of ``|c - r|``.
    - ``fraction_beyond``: share of elements with ``|c - r| > element_tolerance * max(|r|, floor)``, where ``floor`` is
      the root mean square of the element's own row of the reference. So an element near zero is held to the scale of
      its row, and one huge row (an attention sink) does not hide the others. Where a row is measured in stretches
      (see ``Meter``), ``floor`` is that of the stretch.
    - ``nonfinite_mismatch``: elements where one side is NaN, +inf or -inf and the other is not the same of these.
    - ``max_ulp``: largest ``|c - r| / spacing(max(|r|, |c|))``, the spacing being that of the coarser dtype of the two
      sides: that of its subnormals near zero, 1 where both sides are integers.
    - ``row_rel_l2``: for each row ``||c - r||`` over the row's ``||r||``, or over a tenth of the root mean square of
      the norms of all rows where that is more, so that a row near zero does not explode. Where the whole reference is
      zero, the candidate's rows give the scale. Infinite for a row with a nonfinite mismatch.
    """

    rows: int
    count: int
    max_abs: float
    max_abs_row: int
    max_abs_column: int
    max_abs_reference: float
    max_abs_candidate: float
    rel_l2: float
    rel_max: float
    cosine: float
    norm_ratio: float
    mean_error: float
    mean_abs: float
    fraction_beyond: float
    nonfinite_reference: int
    nonfinite_candidate: int
    nonfinite_mismatch: int
    max_ulp: float
    row_rel_l2: array[float]

    def as_dict(self) -> dict[str, float]:
        """Every number by name, without the one per row."""
        return {name: float(getattr(self, name)) for name in self.__struct_fields__ if name != "row_rel_l2"}
