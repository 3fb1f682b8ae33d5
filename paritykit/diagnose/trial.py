"""Hypotheses, held against what the candidate computed.

A hypothesis predicts the candidate's rows: the reference's computation with one thing changed. Of the difference that
there is, ``residual = |candidate - predicted| / |candidate - reference|`` is left. It *fits* where what is left is
within what is allowed between two correct engines, and is less than half of the difference.

Each cause is weighed by its best hypothesis: ``weight = prior * 100**-free / max(residual, noise)**2``, where ``free``
counts numbers that were fitted to the candidate and ``noise`` is a tenth of what is allowed, relative to the
difference. Its confidence is ``(1 - residual**2) * weight / (sum of all causes' weights)``: the share of the difference
that it explains, times how much better it does so than what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from paritykit.diagnose.scene import Scene

Predict = Callable[[str], torch.Tensor]
"""The rows a hypothesis expects of a case, ``[positions, features]``; NaN where it says nothing."""
EXPLAINED = 0.5
"""Share of the difference that may be left at most."""
NOISE = 0.1
"""Rounding of correct engines, as a share of what is allowed between them."""
OCCAM = 100.0
COVERED = 0.5
"""Share of the difference that a hypothesis must speak of at least."""


@dataclass(frozen=True)
class Trial:
    """A hypothesis: ``label`` completes "with ... the reference gives the candidate's numbers".

    ``free`` numbers were fitted to the candidate, and not taken from config or custom. ``prior`` weighs what computes
    the same.
    """

    label: str
    predict: Predict
    free: int = 0
    prior: float = 1.0


@dataclass(frozen=True)
class Pattern:
    """What cannot be computed but shows: a sentence, and how sure it makes of the cause where no trial fits."""

    label: str
    confidence: float


@dataclass(frozen=True)
class Tried:
    """A hypothesis that was held against the candidate."""

    trial: Trial
    residual: float
    fits: bool
    noise: float

    @property
    def weight(self) -> float:
        """See the module."""
        free = min(self.trial.free, 2)
        return float(self.trial.prior * OCCAM**-free / max(self.residual, self.noise, 1e-9) ** 2)


class Bar:
    """Both sides' rows of a scene's point, all cases together, for hypotheses to be held against."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.reference = torch.cat([scene.reference(scene.point, c) for c in scene.cases])
        self.candidate = torch.cat([scene.candidate(scene.point, c) for c in scene.cases])
        there = torch.cat([scene.present(scene.point, c) for c in scene.cases])
        finite = self.candidate.isfinite().all(1)
        self.spoilt = there & ~finite & self.reference.isfinite().all(1)
        self.judged = there & finite & self.reference.isfinite().all(1)
        self.decode = torch.cat([torch.arange(scene.length(c)) >= scene.prompt(c) for c in scene.cases])
        self.difference = (self.candidate - self.reference).nan_to_num().norm(dim=1) * self.judged
        self.scale = self._row_scale(self.reference)
        self.wrong = (self.difference > scene.allowed.whole * self.scale) | self.spoilt

    @property
    def in_decode_only(self) -> bool:
        """Whether only what was decoded is wrong, though something was not."""
        return bool(self.wrong.any() and not (self.wrong & ~self.decode).any() and (self.judged & ~self.decode).any())

    def hold(self, trial: Trial) -> Tried:
        """What is left of the difference. Raises what the prediction raises, ValueError where it has another shape."""
        predicted = torch.cat([trial.predict(c) for c in self._scene.cases]).to(self.reference.dtype)
        if predicted.shape != self.reference.shape:
            raise ValueError(f"predicted {list(predicted.shape)}, not {list(self.reference.shape)}")
        tried = self._measure(trial, predicted)
        if not tried.fits and self.in_decode_only:
            late = torch.where(self.decode[:, None], predicted, self.reference)
            again = self._measure(replace(trial, label=f"{trial.label}, in decode only,"), late)
            return again if again.fits else min(tried, again, key=lambda t: t.residual)
        return tried

    def _measure(self, trial: Trial, predicted: torch.Tensor) -> Tried:
        said = predicted.isfinite().all(1)
        rows = self.judged & said
        left = (self.candidate - predicted).nan_to_num().norm(dim=1) * rows
        whole, remains = _norm(self.difference[rows]), _norm(left)
        spoken = whole >= COVERED * _norm(self.difference) and not (self.spoilt & said).any()
        if not whole or not math.isfinite(remains):
            return Tried(trial, 1.0, fits=False, noise=1.0)
        size = max(_norm(x[rows].norm(dim=1)) for x in (self.reference, self.candidate))
        allowed = self._scene.allowed
        within = remains <= allowed.whole * size and bool(
            (left <= allowed.position * self.scale.clamp_min(1e-30)).all()
        )
        residual = remains / whole
        return Tried(
            trial,
            residual,
            fits=spoken and within and residual <= EXPLAINED,
            noise=NOISE * allowed.whole * size / whole,
        )

    def _row_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Size of each row, but not less than a tenth of the usual, and that of the candidate where it is larger."""
        sizes = torch.maximum(rows.nan_to_num().norm(dim=1), self.candidate.nan_to_num().norm(dim=1) * self.judged)
        usual = sizes[self.judged].pow(2).mean().sqrt() if self.judged.any() else sizes.max()
        return sizes.clamp_min(0.1 * float(usual))


def _norm(values: torch.Tensor) -> float:
    return float(values.double().norm())
