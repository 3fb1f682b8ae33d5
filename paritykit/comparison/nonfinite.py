"""NaN and infinities: counted, and taken out of a tile before it is measured."""

from __future__ import annotations

from typing import NamedTuple

import torch

from paritykit.comparison.noise import Floats


class Nonfinite(NamedTuple):
    """What was left out of a tile; ``mismatches`` and ``widths`` (elements that remain, at least 1) are per row."""

    reference: int
    candidate: int
    left_out: int
    mismatches: Floats
    widths: Floats


def without_nonfinite(reference: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Nonfinite]:
    """Float64 copies of both ``[rows, features]`` with zeros wherever either is not finite, and the counts."""
    r, c = (x.to(torch.float64, copy=True).contiguous() for x in (reference, candidate))
    bad_r, bad_c = ~r.isfinite(), ~c.isfinite()
    left_out = bad_r | bad_c
    mismatch = left_out & (r != c) & ~(r.isnan() & c.isnan())
    per_row = torch.stack([mismatch.sum(1), left_out.logical_not().sum(1).clamp_min(1)]).to(torch.float64).cpu().numpy()
    reference_count, candidate_count, out = (int(x.sum()) for x in (bad_r, bad_c, left_out))
    found = Nonfinite(reference_count, candidate_count, out, mismatches=per_row[0], widths=per_row[1])
    return r.masked_fill_(left_out, 0), c.masked_fill_(left_out, 0), found
