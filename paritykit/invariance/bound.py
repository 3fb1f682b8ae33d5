"""How far two runs of one engine may differ where only the order of sums is another. Torch-free.

A sum of K terms of random sign, added one after the other with unit roundoff u, is off by about u sqrt(K / 2) of its
own size (each partial sum rounds once, and grows as the root of its terms); two orders differ by sqrt(2) of that,
u sqrt(K). Sums are kept in float32 at least. What is stored in fewer bits may then round the other way: one rounding
more. Errors of the points computed before are independent and add as the root of their number. ``SIGMAS`` such
deviations are allowed. After Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4.
"""

from __future__ import annotations

import math

from paritykit.comparison.tolerance import POSITION_FACTOR, ROUNDING, Tolerance, coarser

SIGMAS = 3.0
EXACT = Tolerance(0.0, 0.0, "the same operations in the same order: bit for bit")


def reordering(dtypes: tuple[str, str], *, depth: int, terms: int) -> Tolerance:
    """Allowed ``rel_l2`` of a point that ``depth`` points were computed before, where sums have up to ``terms`` terms.

    >>> round(reordering(("float32", "float32"), depth=0, terms=256).whole * 2**24)
    48
    """
    name = coarser(dtypes)
    stored = ROUNDING[name] if ROUNDING[name] > ROUNDING["float32"] else 0.0
    unit = min(ROUNDING[name], ROUNDING["float32"])
    whole = SIGMAS * math.sqrt(depth + 1) * (unit * math.sqrt(terms) + stored)
    source = (
        f"order of sums: {SIGMAS:g} x sqrt({depth + 1} points) x (sqrt({terms} terms) roundings of "
        f"{'float64' if unit < ROUNDING['float32'] else 'float32'}{f' + one of {name}' if stored else ''})"
    )
    return Tolerance(whole, whole * POSITION_FACTOR, source)
