"""Caps by tanh, of scores or of logits; and one number fitted to the candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

USUAL_CAPS = (50.0, 30.0, 20.0, 15.0, 10.0, 5.0, 3.0, 2.0)
GOLDEN = (3 - math.sqrt(5)) / 2
ROUNDS = 60
EXACT = 1e-9
"""How near the smallest error a logarithm is found; nearer, rounding decides."""


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
    """The number between ``low`` and ``high`` whose prediction is nearest to the candidate, by its logarithm.

    Two cases are enough to find it, or the part of them that was looked at first.
    """
    if name not in scene.fits:
        target = {c: scene.candidate(scene.point, c) for c in scene.cases[:2]}

        def error(log: float) -> float:
            parts = [(predict(math.exp(log), c) - t).nan_to_num().double().norm() ** 2 for c, t in target.items()]
            return float(torch.stack(parts).sum())

        scene.fits[name] = math.exp(smallest(error, math.log(low), math.log(high)))
    found: float = scene.fits[name]
    return found


def smallest(error: Callable[[float], float], low: float, high: float) -> float:
    """Where ``error`` is smallest between ``low`` and ``high``, by Brent's method (1973, chapter 5).

    Parabolas through the best three points, golden section where they do not close in: a dozen or two of errors.
    """
    best = second = third = low + GOLDEN * (high - low)
    at_best = at_second = at_third = error(best)
    step = before = 0.0
    for _ in range(ROUNDS):
        middle, nearest = (low + high) / 2, EXACT * (1 + abs(best))
        if abs(best - middle) <= 2 * nearest - (high - low) / 2:
            break
        r, q = (best - second) * (at_best - at_third), (best - third) * (at_best - at_second)
        above, below = (best - third) * q - (best - second) * r, 2 * (q - r)
        wanted = -above / below if below else math.inf
        if low < best + wanted < high and abs(wanted) < abs(before) / 2:
            before, step = step, wanted
            if min(best + step - low, high - best - step) < 2 * nearest:
                step = math.copysign(nearest, middle - best)
        else:
            before = (high if best < middle else low) - best
            step = GOLDEN * before
        tried = best + (step if abs(step) >= nearest else math.copysign(nearest, step))
        at = error(tried)
        if at <= at_best:
            low, high = (best, high) if tried >= best else (low, best)
            third, at_third, second, at_second, best, at_best = second, at_second, best, at_best, tried, at
            continue
        low, high = (tried, high) if tried < best else (low, tried)
        if at <= at_second or second == best:
            third, at_third, second, at_second = second, at_second, tried, at
        elif at <= at_third or third in (best, second):
            third, at_third = tried, at
    return best
