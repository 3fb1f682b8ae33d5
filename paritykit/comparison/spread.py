"""Measuring twin and candidate against the truth at once: how their errors spread over positions and channels."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from paritykit.comparison.lanes import run_lanes
from paritykit.comparison.noise import LEAST_CHANNEL, LEAST_ROW, Floats, Noise, Spread, scales_of, share_of
from paritykit.comparison.precision import shared_precision

STRETCH = 1 << 17
"""Elements of a tile on CPU: three tensors and two scratch rooms of it stay in the cache."""
DEVICE_TILE = 1 << 24
TRUSTED = 1e-26
"""A row's sum of squares below it may have lost terms that are no float32."""


class SpreadMeter:
    """Measures truth, twin and candidate fed span by span; what was fed before counts on."""

    def __init__(self) -> None:
        self._found: list[Sums] = []

    def update(self, truth: torch.Tensor, twin: torch.Tensor, candidate: torch.Tensor) -> None:
        """Measure more rows, ``[rows, features]`` each, of any real dtypes. Raises ValueError for other shapes."""
        if truth.ndim != 2 or not truth.shape == twin.shape == candidate.shape:
            shapes = ", ".join(str(list(x.shape)) for x in (truth, twin, candidate))
            raise ValueError(f"truth, twin and candidate must be [rows, features] of one shape, not {shapes}")
        self._found += sums_of(truth, twin, candidate)

    def result(self) -> Noise:
        """What is known of everything fed so far. Raises ValueError where not one element was fed."""
        found = [s for s in self._found if s.rows.size and s.columns.size]
        if not found:
            raise ValueError("nothing was measured: no tensor with elements was fed")
        columns: Floats = np.sum([s.columns for s in found], axis=0)
        return _noise(np.concatenate([s.rows for s in found], axis=1), columns)


class Sums:
    """Sums over some rows, and for each row: the truth's squares, then for twin and candidate squares of the error and
    its dots with the truth. ``columns`` also hold, last for each side, plain sums of the error.
    """

    def __init__(self, height: int, width: int) -> None:
        self.rows: Floats = np.zeros((5, height))
        self.columns: Floats = np.zeros((7, width))


def sums_of(truth: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> list[Sums]:
    """The sums of two sides against the truth, ``[rows, features]`` each, part of the rows by part."""
    parts = _parts(truth)
    return run_lanes([partial(_sums, truth[p], left[p], right[p]) for p in parts]) if parts else []


@torch.inference_mode()
def _sums(truth: torch.Tensor, twin: torch.Tensor, candidate: torch.Tensor) -> Sums:
    found = Sums(*truth.shape)
    narrow = all(shared_precision(truth.dtype, x.dtype).work == torch.float32 for x in (twin, candidate))
    desk = _Desk(torch.float32 if narrow else torch.float64, truth.device)
    for row, column in _tiles(truth):
        sides = [x[row, column] for x in (truth, twin, candidate)]
        part = desk.measure(*sides) or _Desk(torch.float64, truth.device).measure(*_finite(sides), trust=True)
        assert part is not None
        found.rows[:, row] += part[0]
        found.columns[:, column] += part[1]
    return found


class _Desk:
    """Scratch memory, and the arithmetic on one tile."""

    def __init__(self, work: torch.dtype, device: torch.device) -> None:
        self._work, self._device = work, device
        self._rooms: dict[tuple[str, torch.Size], torch.Tensor] = {}
        self._ones: dict[int, torch.Tensor] = {}

    def measure(
        self, truth: torch.Tensor, twin: torch.Tensor, candidate: torch.Tensor, *, trust: bool = False
    ) -> tuple[Floats, Floats] | None:
        """Row sums ``[5, rows]`` and column sums ``[7, features]``; None where one of them cannot be trusted."""
        t = truth if truth.dtype == self._work else self._room("truth", truth).copy_(truth)
        product = self._room("product", truth)
        torch.mul(t, t, out=product)
        rows, columns = [self._total(product, along=True)], [self._total(product, along=False)]
        for side in (twin, candidate):
            error = self._room("error", truth).copy_(side).sub_(t)
            plain = self._total(error, along=False)
            torch.mul(error, t, out=product)
            dots = self._total(product, along=True), self._total(product, along=False)
            torch.mul(error, error, out=product)
            rows += [self._total(product, along=True), dots[0]]
            columns += [self._total(product, along=False), dots[1], plain]
        found = tuple(torch.stack(x).to(torch.float64).cpu().numpy() for x in (rows, columns))
        if not (trust or self._holds(*found)):
            return None
        return found[0], found[1]

    def _holds(self, rows: Floats, columns: Floats) -> bool:
        lost = self._work == torch.float32 and bool((rows[[0, 1, 3]] < TRUSTED).any())
        return not lost and bool(np.isfinite(rows).all() and np.isfinite(columns).all())

    def _total(self, tensor: torch.Tensor, *, along: bool) -> torch.Tensor:
        """The sum of each row (``along``) or of each column: as a product with ones, which is faster."""
        length = tensor.shape[1 if along else 0]
        if length not in self._ones:
            self._ones[length] = torch.ones(length, dtype=self._work, device=self._device)
        return torch.mv(tensor if along else tensor.t(), self._ones[length])

    def _room(self, name: str, like: torch.Tensor) -> torch.Tensor:
        key = (name, like.shape)
        if key not in self._rooms:
            self._rooms[key] = torch.empty(like.shape, dtype=self._work, device=self._device)
        return self._rooms[key]


def _finite(sides: list[torch.Tensor]) -> list[torch.Tensor]:
    """Float64 copies, with zeros wherever one of them is not finite."""
    wide = [x.to(torch.float64, copy=True) for x in sides]
    bad = ~torch.stack([x.isfinite() for x in wide]).all(0)
    return [x.masked_fill_(bad, 0.0) for x in wide]


def _parts(tensor: torch.Tensor) -> list[slice]:
    """The rows of each lane: one lane on an accelerator or for less than two tiles."""
    rows = tensor.shape[0]
    lanes = min(torch.get_num_threads(), rows, tensor.numel() // STRETCH) if tensor.device.type == "cpu" else 1
    height = -(-rows // max(lanes, 1)) or 1
    return [slice(first, first + height) for first in range(0, rows, height)]


def _tiles(tensor: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    rows, features = tensor.shape
    if not rows * features:
        return
    stretches = -(-features // STRETCH)
    width = -(-features // stretches)
    height = max(1, (STRETCH if tensor.device.type == "cpu" else DEVICE_TILE) // width)
    for row in range(0, rows, height):
        for column in range(0, features, width):
            yield slice(row, min(row + height, rows)), slice(column, min(column + width, features))


def _noise(rows: Floats, columns: Floats) -> Noise:
    twin = _spread(rows[0], rows[1], rows[2], columns[0], columns[1:4])
    candidate = _spread(rows[0], rows[3], rows[4], columns[0], columns[4:7])
    return Noise(
        rows=rows.shape[1],
        features=columns.shape[1],
        even_rows=min(_evenness(rows[0]), _evenness(rows[1])),
        even_channels=min(_evenness(columns[0]), _evenness(columns[1])),
        twin=twin,
        candidate=candidate,
    )


def _spread(truth: Floats, squares: Floats, dots: Floats, channels: Floats, errors: Floats) -> Spread:
    """``truth``, ``squares`` and ``dots`` are of rows, ``channels`` the truth's squares of columns."""
    total, count = float(truth.sum()), len(truth) * len(channels)
    size, error = math.sqrt(total) or 1.0, float(squares.sum())
    variance = max(error / count - (float(errors[2].sum()) / count) ** 2, 0.0)
    return Spread(
        whole=math.sqrt(error) / size,
        scale=float(dots.sum()) / total if total else 0.0,
        row_scale=share_of(dots, truth) / size,
        channel_scale=share_of(errors[1], channels) / size,
        channel_bias=share_of(errors[2], np.full(len(channels), float(len(truth)))) / size,
        sigma=math.sqrt(variance * count) / size,
        row=_relative(squares, truth, least=LEAST_ROW),
        channel=_relative(errors[0], channels, least=LEAST_CHANNEL),
    )


def _relative(squares: Floats, truth: Floats, *, least: float) -> array[float]:
    """Errors of rows or channels at their own scale."""
    return array("d", (np.sqrt(squares) / scales_of(truth, least=least)).tobytes())


def _evenness(energies: Floats) -> float:
    """``sum(q) ** 2 / sum(q ** 2)``; how many there are where all are zero."""
    largest = float(energies.max())
    if not largest:
        return float(len(energies))
    shares = energies / largest
    return float(shares.sum()) ** 2 / float((shares**2).sum())
