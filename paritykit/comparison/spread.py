"""Measuring twin and candidate against the truth at once: how their errors spread over positions and channels."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from paritykit.comparison.lanes import run_lanes
from paritykit.comparison.noise import LEAST_CHANNEL, LEAST_ROW, Floats, Noise, Spread, scales_of, share_of
from paritykit.comparison.precision import shared_precision

STRETCH = 1 << 17
"""Elements that are worth a thread."""
TILE, DEVICE_TILE = 1 << 20, 1 << 24
"""Elements of all sides that are measured at once: fewer cost more calls, more leave the cache."""
LEAST_ROWS = 8
"""Rows of a tile at least: sums over one row alone, of all channels, cost as much as those over several."""
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
        self._found += sums_of(truth, [twin, candidate])

    def result(self) -> Noise:
        """What is known of everything fed so far. Raises ValueError where not one element was fed."""
        found = [s for s in self._found if s.rows.size and s.columns.size]
        if not found:
            raise ValueError("nothing was measured: no tensor with elements was fed")
        columns: Floats = np.sum([s.columns for s in found], axis=0)
        return _noise(np.concatenate([s.rows for s in found], axis=1), columns)


class Sums:
    """Sums over some rows, and for each row: the truth's squares, then for each side squares of the error and its dots
    with the truth. ``columns`` also hold, last for each side, plain sums of the error.
    """

    def __init__(self, height: int, width: int, *, sides: int) -> None:
        self.rows: Floats = np.zeros((1 + 2 * sides, height))
        self.columns: Floats = np.zeros((1 + 3 * sides, width))


def sums_of(truth: torch.Tensor, sides: Sequence[torch.Tensor]) -> list[Sums]:
    """The sums of all ``sides`` against the truth, ``[rows, features]`` each, part of the rows by part."""

    parts = _parts(truth)
    return run_lanes([partial(_sums, truth[p], [x[p] for x in sides]) for p in parts]) if parts else []


@torch.inference_mode()
def _sums(truth: torch.Tensor, sides: Sequence[torch.Tensor]) -> Sums:
    count = len(sides)
    found = Sums(*truth.shape, sides=count)
    narrow = all(shared_precision(truth.dtype, x.dtype).work == torch.float32 for x in sides)
    desk = _Desk(torch.float32 if narrow else torch.float64, truth.device)
    for row, column in _tiles(truth, sides=count):
        own, some = truth[row, column], [x[row, column] for x in sides]
        part = desk.measure(own, some) or _Desk(torch.float64, truth.device).measure(*_finite(own, some), trust=True)
        assert part is not None
        found.rows[:, row] += part[0]
        found.columns[:, column] += part[1]
    return found


class _Desk:
    """Scratch memory, and the arithmetic on one tile."""

    def __init__(self, work: torch.dtype, device: torch.device) -> None:
        self._work, self._device = work, device
        self._rooms: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def measure(
        self, truth: torch.Tensor, sides: Sequence[torch.Tensor], *, trust: bool = False
    ) -> tuple[Floats, Floats] | None:
        """Row sums ``[1 + 2 * sides, rows]`` and column sums ``[1 + 3 * sides, features]``.

        None where one of them cannot be trusted.
        """
        shape = torch.Size((len(sides), *truth.shape))
        t = truth if truth.dtype == self._work else self._room("truth", truth.shape).copy_(truth)
        error, product = self._room("error", shape), self._room("product", shape)
        for own, side in zip(error, sides, strict=True):
            own.copy_(side)
        error.sub_(t)
        squared = torch.mul(t, t, out=product[0])
        rows, columns = [squared.sum(1)[None]], [squared.sum(0)[None]]
        plain = error.sum(1)
        torch.mul(error, t, out=product)
        dots = product.sum(2), product.sum(1)
        torch.mul(error, error, out=product)
        squares = product.sum(2), product.sum(1)
        if not trust and self._lost(t, error, torch.cat([*rows, squares[0]])):
            return None
        rows.append(torch.stack((squares[0], dots[0]), 1).flatten(0, 1))
        columns.append(torch.stack((squares[1], dots[1], plain), 1).flatten(0, 1))
        found = tuple(torch.cat(x).to(torch.float64).cpu().numpy() for x in (rows, columns))
        if not trust and not all(np.isfinite(x).all() for x in found):
            return None
        return found[0], found[1]

    def _lost(self, truth: torch.Tensor, error: torch.Tensor, squares: torch.Tensor) -> bool:
        """Whether a row's sum of squares, of the truth or of a side, is that of numbers too small to be squared."""
        if self._work != torch.float32 or not bool((squares < TRUSTED).any()):
            return False
        largest = torch.cat([truth.abs().amax(1)[None], error.abs().amax(2)])
        return bool(((squares < TRUSTED) & (largest > 0)).any())

    def _room(self, name: str, shape: torch.Size) -> torch.Tensor:
        key = (name, shape)
        if key not in self._rooms:
            self._rooms[key] = torch.empty(shape, dtype=self._work, device=self._device)
        return self._rooms[key]


def _finite(truth: torch.Tensor, sides: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Float64 copies, with zeros wherever one of them is not finite."""
    wide = [x.to(torch.float64, copy=True) for x in (truth, *sides)]
    bad = ~torch.stack([x.isfinite() for x in wide]).all(0)
    own, *others = (x.masked_fill_(bad, 0.0) for x in wide)
    return own, others


def _parts(tensor: torch.Tensor) -> list[slice]:
    """The rows of each lane: one lane on an accelerator or for less than two tiles."""
    rows = tensor.shape[0]
    lanes = min(torch.get_num_threads(), rows, tensor.numel() // STRETCH) if tensor.device.type == "cpu" else 1
    height = -(-rows // max(lanes, 1)) or 1
    return [slice(first, first + height) for first in range(0, rows, height)]


def _tiles(tensor: torch.Tensor, *, sides: int) -> Iterator[tuple[slice, slice]]:
    rows, features = tensor.shape
    if not rows * features:
        return
    room = (TILE if tensor.device.type == "cpu" else DEVICE_TILE) // sides
    width = -(-features // -(-features // room))
    height = max(LEAST_ROWS, room // width)
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
