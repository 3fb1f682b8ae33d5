"""Measuring aligned tensors: every metric in one pass, in memory bounded by one tile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from paritykit.comparison.lanes import run_lanes
from paritykit.comparison.measurement import Measurement
from paritykit.comparison.nonfinite import without_nonfinite
from paritykit.comparison.precision import exact_precision, shared_precision
from paritykit.comparison.tile import Bench
from paritykit.comparison.totals import Totals

ELEMENT_TOLERANCE = 0.05
"""Far beyond what rounding to bfloat16 (0.4 %) does to one element, and still a small relative error."""

STRETCH = 1 << 18
"""Elements of a tile on CPU: few enough to stay in the cache. A row that is wider is measured in equal stretches."""

DEVICE_TILE = 1 << 24
"""Elements of a tile on an accelerator, where launches and not the cache are what costs."""


class Meter:
    """Measures a pair of tensors fed span by span; what was fed before counts on.

    Several updates give what one update with their concatenation gives. ``element_tolerance`` is the relative error
    beyond which an element counts in ``fraction_beyond``. Rows wider than ``STRETCH`` are measured in equal stretches.
    On CPU as many threads take part as torch has, each with rows of its own.
    """

    def __init__(self, *, element_tolerance: float = ELEMENT_TOLERANCE) -> None:
        self.element_tolerance = element_tolerance
        self._totals = Totals()
        self._gauges: list[_Gauge] = []

    def update(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Measure more rows, ``[rows, features]`` on each side, of any real dtypes and strides.

        float64 and integers of 32 bits or more are measured in float64 (which holds integers up to 2**53 and squares of
        magnitudes from 1e-150 to 1e150), all else in float32 with sums carried on in float64. Raises ValueError unless
        both are 2-D, of one shape, on one device.
        """
        _check(reference, candidate)
        parts = _parts(reference)
        while len(self._gauges) < len(parts):
            self._gauges.append(_Gauge(self.element_tolerance))
        works = [
            partial(gauge.measure, reference[part], candidate[part])
            for gauge, part in zip(self._gauges, parts, strict=False)
        ]
        for totals in run_lanes(works):
            self._totals.append(totals)

    def result(self) -> Measurement:
        """The metrics of everything fed so far. Raises ValueError where not one element was fed."""
        return self._totals.measurement()


class _Gauge:
    """Measures one lane's rows, tile by tile, in scratch memory that is kept."""

    def __init__(self, element_tolerance: float) -> None:
        self.element_tolerance = element_tolerance
        self._benches: dict[tuple[torch.dtype, torch.dtype, bool], Bench] = {}

    @torch.inference_mode()
    def measure(self, reference: torch.Tensor, candidate: torch.Tensor) -> Totals:
        totals = Totals(*reference.shape)
        for row, column, r, c in _tiles(reference, candidate):
            tile = self._bench(r, c).measure(r, c, widths=r.shape[1])
            if tile is None:
                clean_r, clean_c, found = without_nonfinite(r, c)
                tile = self._bench(r, c, exact=True).measure(clean_r, clean_c, widths=found.widths)
                assert tile is not None
                totals.add_nonfinite(found, row=row)
            totals.add(tile, r, c, row=row, column=column)
        return totals

    def _bench(self, reference: torch.Tensor, candidate: torch.Tensor, *, exact: bool = False) -> Bench:
        key = (reference.dtype, candidate.dtype, exact)
        bench = self._benches.get(key)
        if bench is None or bench.size < reference.numel() or bench.device != reference.device:
            precision = shared_precision(reference.dtype, candidate.dtype)
            if exact:
                precision = exact_precision(precision.smallest, precision.epsilon)
            bench = self._benches[key] = Bench(
                precision,
                device=reference.device,
                size=reference.numel(),
                element_tolerance=self.element_tolerance,
            )
        return bench


def measure(
    reference: torch.Tensor, candidate: torch.Tensor, *, element_tolerance: float = ELEMENT_TOLERANCE
) -> Measurement:
    """The metrics of one pair, ``[rows, features]`` each; raises as ``Meter.update`` and ``Meter.result`` do."""
    meter = Meter(element_tolerance=element_tolerance)
    meter.update(reference, candidate)
    return meter.result()


def _check(reference: torch.Tensor, candidate: torch.Tensor) -> None:
    if reference.ndim != 2 or reference.shape != candidate.shape:
        shapes = f"{list(reference.shape)} and {list(candidate.shape)}"
        raise ValueError(f"both sides must be [rows, features] of one shape, not {shapes}")
    if reference.device != candidate.device:
        raise ValueError(f"both sides must be on one device, not {reference.device} and {candidate.device}")


def _parts(tensor: torch.Tensor) -> list[slice]:
    """The rows of each lane: one lane on an accelerator or for less than two tiles."""
    rows = tensor.shape[0]
    lanes = min(torch.get_num_threads(), rows, tensor.numel() // STRETCH) if tensor.device.type == "cpu" else 1
    height = -(-rows // max(lanes, 1)) or 1
    return [slice(first, first + height) for first in range(0, rows, height)] or [slice(0)]


def _tiles(reference: torch.Tensor, candidate: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """First row, first column and both sides of every tile, row by row."""
    rows, features = reference.shape
    if not rows * features:
        return
    stretches = -(-features // STRETCH)
    width = -(-features // stretches)
    height = max(1, (STRETCH if reference.device.type == "cpu" else DEVICE_TILE) // width)
    for row in range(0, rows, height):
        for column in range(0, features, width):
            part = (slice(row, row + height), slice(column, column + width))
            yield row, column, reference[part], candidate[part]
