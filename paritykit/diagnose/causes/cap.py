"""Caps by tanh, of scores or of logits; and one number fitted to the candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

USUAL_CAPS = (50.0, 30.0, 20.0, 15.0, 10.0, 5.0, 3.0, 2.0)
GOLDEN = (math.sqrt(5) - 1) / 2
ROUNDS = 40


def capped(rows: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(rows / cap)``; ``rows`` without a cap."""
    return rows if cap is None else torch.tanh(rows / cap) * cap


def caps(
    scene: Scene, what: str, own: float | None, predict: Callable[[float | None, str], torch.Tensor]
) -> Iterator[Trial]:
    """No cap, those that are usual, and the one that fits best; ``predict(cap, case)`` gives the scene's point."""
    told = f"instead of {own:g}" if own else "though there is none"
    if own is not None:
        yield Trial(f"with {what} not capped", partial(predict, None))
    named = [scene.config.get(n) for n in ("attn_logit_softcapping", "final_logit_softcapping")]
    for cap in dict.fromkeys([*(float(c) for c in named if isinstance(c, int | float)), *USUAL_CAPS]):
        if cap != own:
            yield Trial(f"with {what} capped at {cap:g} {told}", partial(predict, cap))
    best = fitted(scene, predict, name=f"cap of {what}", low=0.3, high=300.0)
    yield Trial(f"with {what} capped at {best:.4g} {told}", partial(predict, best), free=1)


def fitted(scene: Scene, predict: Callable[[float, str], torch.Tensor], *, name: str, low: float, high: float) -> float:
    """The number between ``low`` and ``high`` whose prediction is nearest to the candidate, by golden section of logs.

    Two cases are enough to find it, or the part of them that was looked at first.
    """
    if name not in scene.fits:
        target = {c: scene.candidate(scene.point, c) for c in scene.cases[:2]}

        def error(log: float) -> float:
            parts = [(predict(math.exp(log), c) - t).nan_to_num().double().norm() ** 2 for c, t in target.items()]
            return float(torch.stack(parts).sum())

        scene.fits[name] = math.exp(smallest(error, math.log(low), math.log(high)))
    return scene.fits[name]


def smallest(error: Callable[[float], float], a: float, b: float) -> float:
    """Where ``error`` is smallest between ``a`` and ``b``, by golden section: each step computes it once."""
    c, d = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
    at_c, at_d = error(c), error(d)
    for _ in range(ROUNDS):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - GOLDEN * (b - a)
            at_c = error(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + GOLDEN * (b - a)
            at_d = error(d)
    return (a + b) / 2
