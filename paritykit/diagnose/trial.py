"""Hypotheses, held against what the candidate computed.

A hypothesis predicts the candidate's rows: the reference's computation with one thing changed. Of the difference that
there is, ``residual = |candidate - predicted| / |candidate - reference|`` is left. It *fits* where what is left is
within what is allowed between two correct engines, and is less than half of the difference. Beside a noise floor it
also fits where no more is left than noise, and what is not left is far more than noise gives by chance.

What is wrong only in part, or by a number between those that are tried, differs in the same direction by less. So a
hypothesis that does not fit as it stands is held against the candidate *in part* too: the share of its effect that
comes nearest is one more number that was fitted.

Each cause is weighed by its best hypothesis: ``weight = prior * 100**-free / max(residual, noise)**32``, where ``free``
counts numbers that were fitted to the candidate and ``noise`` is the noise floor, relative to the difference. So errors
are taken to be made of 32 independent numbers, as ``comparison.floor`` does of one position. Its confidence is
``(1 - residual**2) * weight / (sum of all causes' weights)``: the share of the difference that it explains, times how
much better it does so than what else was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from paritykit.comparison.floor import FACTOR
from paritykit.comparison.guard import DEGREES
from paritykit.diagnose.scene import Scene

Predict = Callable[[str], torch.Tensor]
"""The rows a hypothesis expects of a case, ``[positions, features]``; NaN where it says nothing."""
EXPLAINED = 0.5
"""Share of the difference that may be left at most."""
NOISE = 0.1
"""Rounding of correct engines, as a share of what is allowed between them, where no floor was measured."""
SAME = 1e-5
"""Share of a difference below which two hypotheses leave the same: each rounds what it changes in its own way."""
OCCAM = 100.0
EVIDENCE = 32
"""Independent numbers that an error is taken to be made of, of which there are more at every point."""
PREDICTED = 4.0
"""Times what an engine is allowed: a prediction rounds in its own way, and its angles at late positions most."""
LEFT = 1.5
"""Noise floors that a correct engine is off by: where no more is left, nothing is left to explain."""
CHANCE = 25.0
"""What noise explains by chance, of its own size: less than this many times one of its independent numbers."""
LEAST = 0.2
"""Of the noise floor, what an effect must amount to: kernels have a bent of their own."""
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
        return float(self.trial.prior * OCCAM**-self.trial.free / max(self.residual, self.noise, SAME) ** EVIDENCE)


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
        rerouted = torch.cat([scene.rerouted(c) for c in scene.cases])
        if 2 * int((self.judged & rerouted).sum()) < int(self.judged.sum()):
            self.judged &= ~rerouted
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
        late = replace(trial, label=f"{trial.label}, in decode only,")
        ways = [(trial, predicted), (late, torch.where(self.decode[:, None], predicted, self.reference))]
        ways = ways if self._some_decoded else ways[:1]
        found = []
        for measure in (self._measure, self._in_part):
            found += [measure(*way) for way in ways]
            if any(t.fits for t in found):
                break
        return max(found, key=lambda t: (t.fits, -t.residual))

    @cached_property
    def _some_decoded(self) -> bool:
        """Whether some positions were decoded, and others not."""
        return bool((self.judged & self.decode).any() and (self.judged & ~self.decode).any())

    def _in_part(self, trial: Trial, predicted: torch.Tensor) -> Tried:
        """The same with a share of its effect, the one that comes nearest to the candidate; none below 0 or above 1."""
        rows = self.judged & predicted.isfinite().all(1)
        effect, difference = (predicted - self.reference)[rows], (self.candidate - self.reference)[rows]
        share = float((effect * difference).double().sum() / effect.double().pow(2).sum().clamp_min(1e-300))
        if not 0 < share < 1:
            return Tried(trial, 1.0, fits=False, noise=1.0)
        label = f"{trial.label.removesuffix(',')}, in part ({share:.2g} of it),"
        weaker = replace(trial, label=label, free=trial.free + 1)
        return self._measure(weaker, self.reference + share * (predicted - self.reference))

    def _measure(self, trial: Trial, predicted: torch.Tensor) -> Tried:
        said = predicted.isfinite().all(1)
        rows = self.judged & said
        left = (self.candidate - predicted).nan_to_num().norm(dim=1) * rows
        whole, remains = _norm(self.difference[rows]), _norm(left)
        spoken = whole >= COVERED * _norm(self.difference) and not (self.spoilt & said).any()
        if not whole or not math.isfinite(remains):
            return Tried(trial, 1.0, fits=False, noise=1.0)
        size = max(_norm(x[rows].norm(dim=1)) for x in (self.reference, self.candidate))
        residual = remains / whole
        enough = residual <= EXPLAINED or self._is_noise(whole, remains, size=size, rows=int(rows.sum()))
        return Tried(
            trial,
            residual,
            fits=spoken and enough and self._within(left, remains, size=size, fitted=trial.free > 0),
            noise=(self._scene.floor or NOISE * self._scene.allowed.whole) * size / whole,
        )

    def _within(self, left: torch.Tensor, remains: float, *, size: float, fitted: bool) -> bool:
        """Whether what is left, of each row and in all, is within what is allowed between two correct engines."""
        allowed, more = self._scene.allowed, 1.0
        if self._scene.floor:
            more = LEFT / FACTOR if fitted else PREDICTED
        rows = left <= max(more, 1.0) * allowed.position * self.scale.clamp_min(1e-30)
        return remains <= more * allowed.whole * size and bool(rows.all())

    def _is_noise(self, whole: float, remains: float, *, size: float, rows: int) -> bool:
        """Whether what is left is noise, and what is not left is none."""
        noise = self._scene.floor * size
        if not noise or remains > LEFT * noise:
            return False
        numbers = rows * min(self.reference.shape[1], DEGREES)
        gained = whole**2 - remains**2
        return gained >= max(CHANCE / numbers, LEAST**2) * noise**2

    def _row_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Size of each row, but not less than a tenth of the usual, and that of the candidate where it is larger."""
        sizes = torch.maximum(rows.nan_to_num().norm(dim=1), self.candidate.nan_to_num().norm(dim=1) * self.judged)
        usual = sizes[self.judged].pow(2).mean().sqrt() if self.judged.any() else sizes.max()
        return sizes.clamp_min(0.1 * float(usual))


def _norm(values: torch.Tensor) -> float:
    return float(values.double().norm())
