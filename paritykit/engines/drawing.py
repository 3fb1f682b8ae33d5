"""Measuring draws of a model's rounding against the truth, in the hooks, without keeping a tensor.

``DrawMeter`` stands where a capture's writer stands: the recorder hands it what modules show, for a batch that holds
one case several times, and it adds up each copy's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from paritykit.captures.feeder import Feeder
from paritykit.captures.layout import DenseLayout
from paritykit.captures.manifest import Segment, point_key
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Recorder, Selection
from paritykit.case import Case
from paritykit.comparison.align import own_rows
from paritykit.comparison.ensemble import EnsembleWriter, PointDraws
from paritykit.comparison.noise import LEAST_CHANNEL, Floats, median, scales_of, share_of
from paritykit.comparison.spread import sums_of
from paritykit.engines.base import Progress
from paritykit.engines.kv import CacheReading, Stored

TOGETHER = 1 << 27
"""Logits, at most, of copies that are run at once: half a gigabyte in float32."""


class Drawing:
    """Runs ``draws`` copies of each case through a transformers model, and measures them against ``truth``.

    ``stored`` is what a KV cache makes of keys and values.
    """

    def __init__(
        self, model: Any, truth: Capture, *, draws: int, vocabulary: int, stored: Stored | None = None
    ) -> None:
        self._model, self._draws, self._vocabulary = model, draws, vocabulary
        self._meter, self._layout = DrawMeter(truth), DenseLayout()
        self._stored = stored

    def run(
        self, cases: Sequence[Case], *, feeder: Feeder | None = None, progress: Progress | None = None
    ) -> EnsembleWriter:
        """What the copies gave, case after case; with ``feeder`` modules go on with what that gives."""
        writer = EnsembleWriter()
        reading = CacheReading(stored=self._stored)
        recorder = Recorder(self._model, self._meter, reading=reading, selection=Selection(), alias=True, feeder=feeder)
        with recorder:
            for number, case in enumerate(cases):
                if progress:
                    progress("drawing roundings", number, len(cases))
                self._run_case(case, number, recorder)
                self._meter.finish(writer)
        return writer

    def _run_case(self, case: Case, number: int, recorder: Recorder) -> None:
        """All copies of one case, as many at once as memory is worth."""
        text = [*case.tokens, *case.forced][: case.positions]
        most = max(TOGETHER // (len(text) * self._vocabulary), 1)
        for first in range(0, self._draws, most):
            copies = min(most, self._draws - first)
            self._meter.begin(case.id, copies=copies)
            self._layout.set(copies, len(text))
            recorder.begin([Segment(number, 0, len(text))] * copies, self._layout.rows)
            self._model(input_ids=torch.tensor([text] * copies, device=self._model.device), use_cache=True)
            recorder.end()


class DrawMeter:
    """Takes the place of a ``PartWriter``: what is recorded is measured against ``truth`` in place of being written.

    All rows of a step are of one case, which ``begin`` names, copy after copy. ``finish`` adds the case to a writer.
    """

    def __init__(self, truth: Capture) -> None:
        self._truth = truth
        self._case, self._copies = "", 0
        self._found: dict[str, list[_Copy]] = {}
        self._also: dict[str, list[str]] = {}
        self._gone: set[str] = set()
        self._now: set[str] = set()

    def begin(self, case: str, *, copies: int) -> None:
        """The next step holds ``copies`` of this case."""
        self._case, self._copies = case, copies

    def step(self, segments: list[Segment]) -> int:
        """See ``PartWriter.step``."""
        del segments
        self._now.clear()
        return 0

    def record(self, tensor: torch.Tensor, *, module: str, port: str, call: int, kind: str, axes: str) -> None:
        """Measure ``tensor``, ``[copies * tokens, ...]``; what is seen twice under one name counts once."""
        del kind, axes
        key = point_key(module, port=port, call=call)
        if key in self._now or key in self._gone:
            return
        self._now.add(key)
        with _disable_current_modes():  # measuring is no part of what is drawn
            self._measure(key, tensor)

    def _measure(self, key: str, tensor: torch.Tensor) -> None:
        length = len(tensor) // self._copies
        truth = own_rows(self._truth, key, self._case, 0, length)
        rows = tensor.reshape(self._copies, length, -1)
        if truth is None or truth.shape != rows.shape[1:] or not tensor.is_floating_point() or not truth.numel():
            self._gone.add(key)
            return
        self._found.setdefault(key, []).extend(_measured(truth, rows))

    def alias(self, source: str, *, module: str, port: str, call: int, kind: str) -> None:
        """See ``PartWriter.alias``."""
        del kind
        key = point_key(module, port=port, call=call)
        names = self._also.setdefault(source, [])
        if key not in names and key not in self._found:
            names.append(key)

    def holds(self, source: str, tensor: torch.Tensor) -> bool:
        """See ``PartWriter.holds``: in transformers nothing is written behind torch's back."""
        del source, tensor
        return True

    def drop(self, module: str, port: str, reason: str) -> None:
        """See ``PartWriter.drop``: a point that is left out has no draws."""
        del reason
        self._gone.add(point_key(module, port=port))

    def finish(self, writer: EnsembleWriter) -> None:
        """Add what was measured of the case, and forget it."""
        for key, copies in self._found.items():
            if key not in self._gone:
                writer.add(_joined(copies), point=key, case=self._case, also=self._also.get(key, ()))
        self._found, self._also, self._gone = {}, {}, set()


class _Copy:
    """The sums of one draw: of rows, and of channels."""

    def __init__(self, rows: Floats, columns: Floats, truth: tuple[Floats, Floats]) -> None:
        self.rows, self.columns, self.truth = rows, columns, truth


def _measured(truth: torch.Tensor, copies: torch.Tensor) -> list[_Copy]:
    """The sums of every copy, as a twin and a candidate are measured."""
    parts = sums_of(truth, copies.unbind())
    rows = np.concatenate([p.rows for p in parts], axis=1)
    columns: Floats = np.sum([p.columns for p in parts], axis=0)
    own = rows[0], columns[0]
    return [_Copy(rows[1 + 2 * n : 3 + 2 * n], columns[1 + 3 * n : 4 + 3 * n], own) for n in range(len(copies))]


def _joined(copies: list[_Copy]) -> PointDraws:
    """All draws of a point. A draw's worst channel is held against what the others do there."""
    truth, channels = copies[0].truth
    squares = np.stack([c.columns[0] for c in copies])
    total, scale, size = squares.sum(0), scales_of(channels, least=LEAST_CHANNEL), float(np.sqrt(truth.sum())) or 1.0
    typical = median((np.sqrt(squares) / scale).ravel()) or np.finfo(np.float64).tiny
    numbers = []
    for copy, own in zip(copies, squares, strict=True):
        others = np.sqrt((total - own) / max(len(copies) - 1, 1)) / scale
        worst = float((np.sqrt(own) / scale / np.maximum(others, typical)).max())
        even = np.full(len(channels), float(len(truth)))
        numbers.append((worst, share_of(copy.columns[1], channels) / size, share_of(copy.columns[2], even) / size))
    return PointDraws(
        truth=truth,
        squares=np.stack([c.rows[0] for c in copies]),
        dots=np.stack([c.rows[1] for c in copies]),
        channel=np.sqrt(total / len(copies)) / scale,
        numbers=np.array(numbers).T,
    )
