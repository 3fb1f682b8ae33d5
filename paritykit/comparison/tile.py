"""Measuring one cache-sized tile ``[rows, features]``: every sum and maximum, in scratch memory made once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from paritykit.comparison.noise import Floats
from paritykit.comparison.precision import Precision


class Tile(NamedTuple):
    """Sums and maxima over one tile; ``*_squares`` of reference and difference are per row."""

    reference_squares: Floats
    difference_squares: Floats
    candidate_squares: float
    product: float
    largest_reference: float
    largest: float = 0.0
    at: tuple[int, int] = (0, 0)
    difference: float = 0.0
    magnitude: float = 0.0
    ulp: float = 0.0
    beyond: int = 0


class Bench:
    """Scratch memory for tiles of up to ``size`` elements, and the arithmetic on them."""

    def __init__(self, precision: Precision, *, device: torch.device, size: int, element_tolerance: float) -> None:
        self.precision = precision
        self.device = device
        self.size = size
        self.element_tolerance = element_tolerance
        self._scratch: dict[str, torch.Tensor] = {}
        self._rooms: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def measure(self, reference: torch.Tensor, candidate: torch.Tensor, *, widths: Floats | int) -> Tile | None:
        """Measure one tile; ``widths`` is how many elements of each row count.

        None where a sum is not finite, or over- or underflowed: the caller then measures in float64, with NaN and
        infinities taken out.
        """
        r, c = self._stage("reference", reference), self._stage("candidate", candidate)
        d = torch.sub(c, r, out=self._room("difference", r))
        s = self._room("first", r)
        squares = [torch.mul(x, x, out=s).sum(1) for x in (r, d)]
        signed = d.sum()
        peaks = [d.abs_().amax(1), torch.abs(r, out=s).amax(1)]
        rr, dd, largest, peak = torch.stack([*squares, *peaks]).to(torch.float64).cpu().numpy()
        if not (self._holds(rr, peak) and self._holds(dd, largest)):
            return None
        t = self._room("second", r)
        cc = float(torch.mul(c, c, out=t).sum())
        if cc < self.precision.trusted[0] and bool(c.any()):
            return None
        tile = Tile(rr, dd, cc, float(torch.mul(c, r, out=t).sum()), float(peak.max()))
        if not largest.any():
            return tile
        row = int(largest.argmax())
        return tile._replace(
            largest=float(largest[row]),
            at=(row, int(d[row].argmax())),
            difference=float(signed),
            magnitude=float(d.sum()),
            ulp=self._largest_ulp(d, s, torch.abs(c, out=t)),
            beyond=self._count_beyond(d, s, largest, np.sqrt(rr / widths)),
        )

    def _largest_ulp(self, d: torch.Tensor, r: torch.Tensor, c: torch.Tensor) -> float:
        """Largest ``d / spacing(max(r, c))`` of magnitudes; overwrites ``c``."""
        bits = torch.maximum(r, c, out=c).view(self.precision.bits)
        torch.bitwise_and(bits, self.precision.exponent, out=bits)
        c.clamp_min_(self.precision.smallest)
        return float(torch.div(d, c, out=c).amax()) / self.precision.epsilon

    def _count_beyond(self, d: torch.Tensor, r: torch.Tensor, largest: Floats, floors: Floats) -> int:
        """How many ``d > element_tolerance * max(r, floor of the row)``, of magnitudes; overwrites ``r``."""
        if not (largest > self.element_tolerance * floors).any():
            return 0
        floor = torch.from_numpy(floors).to(r).unsqueeze(1)
        allowed = torch.maximum(r, floor, out=r).mul_(self.element_tolerance)
        return int(torch.gt(d, allowed, out=allowed).sum())

    def _holds(self, squares: Floats, peaks: Floats) -> bool:
        """Whether the sums of squares of the rows can be trusted, given the largest magnitude of each row."""
        low, high = self.precision.trusted
        top = float(squares.max())  # NaN if any is
        return top < high and not bool(((squares < low) & (peaks > 0)).any())

    def _stage(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or a contiguous copy of it in the working dtype."""
        if tensor.dtype == self.precision.work and tensor.is_contiguous():
            return tensor
        return self._room(name, tensor).copy_(tensor)

    def _room(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Scratch of the shape of ``like``; the views are kept, as nearly all tiles are of one shape."""
        key = (name, like.shape)
        if key not in self._rooms:
            if name not in self._scratch:
                self._scratch[name] = torch.empty(self.size, dtype=self.precision.work, device=self.device)
            self._rooms[key] = self._scratch[name][: like.numel()].view(like.shape)
        return self._rooms[key]
