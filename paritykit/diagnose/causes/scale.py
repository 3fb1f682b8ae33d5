"""A constant factor too much or too few."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from paritykit.diagnose.bench.linear import linear_of
from paritykit.diagnose.causes.weights import row_parallel
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

CLOSE = 1e-4
"""Relative error up to which a factor is taken for a number that is known."""
ONE = 1e-9
SMALLEST = 1e-3
"""Below it the output is rather missing than scaled."""


def scale_factor(scene: Scene) -> Iterator[Trial]:
    """The rows times one number, fitted; a known number where it is one. A linear layer's product without its bias."""
    ours = torch.cat([scene.reference(scene.point, c) for c in scene.cases]).double()
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1) & ours.isfinite().all(1)
    factor = ratio(ours[rows], theirs[rows])
    # A sum over ranks made twice, or shares of experts, give a factor too, and are then the likelier mistake.
    # So does a magnitude of cos and sin, where keys alone are scaled.
    other = row_parallel(scene) or "Experts" in scene.kind(scene.module) or scene.port == "key_cache"
    prior = 0.1 if other else 1.0
    if abs(factor) > SMALLEST and abs(factor - 1) > ONE:
        text, free = named(factor, scene.config)
        label = f"multiplied by {text}"
        yield Trial(label, lambda case: scene.reference(scene.point, case) * factor, free=free, prior=prior)
    if scene.port in ("key_cache", "value_cache"):
        label = "with each key or value of each head multiplied by a factor of its own"
        yield Trial(label, partial(_row_by_row, scene), free=2, prior=prior)
    linear = linear_of(scene, scene.module) if not scene.port else None
    if linear is not None and linear.bias is not None:
        bias = linear.bias
        inner = ratio(ours[rows] - bias, theirs[rows] - bias)
        text, free = named(inner, scene.config)
        if abs(inner) > SMALLEST and abs(inner - 1) > ONE:
            label = f"with the product before the bias multiplied by {text}"
            yield Trial(
                label, lambda case: (scene.reference(scene.point, case) - bias) * inner + bias, free=free, prior=prior
            )


def _row_by_row(scene: Scene, case: str) -> torch.Tensor:
    """The rows of a quantised cache whose scales, one for each head and position, are other than they should be."""
    shape = (-1, *scene.points[scene.point].row)
    ours, theirs = (side(scene.point, case).reshape(shape) for side in (scene.reference, scene.candidate))
    factor = (ours * theirs).sum(-1, keepdim=True) / ours.pow(2).sum(-1, keepdim=True).clamp_min(1e-30)
    return (ours * torch.where(factor.abs() > SMALLEST, factor, 1.0)).flatten(1)


def ratio(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The factor that brings ``ours`` nearest to ``theirs``; 0 for none."""
    return float((ours * theirs).sum() / ours.pow(2).sum().clamp_min(1e-300))


def named(factor: float, config: Mapping[str, Any]) -> tuple[str, int]:
    """A factor in words, and 0 where it is a number that the config knows, 1 where it was fitted."""
    for name, value in known_numbers(config).items():
        if value and abs(factor - value) <= CLOSE * abs(value):
            return f"{factor:.4g} = {name}", 0
    return (f"{factor:.5g}" if abs(factor - 1) > CLOSE else f"1 {factor - 1:+.2g}"), 1


def known_numbers(config: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that factors are made of, by what they are."""
    found: dict[str, float] = {"2": 2.0, "1/2": 0.5}
    hidden, head = config.get("hidden_size"), config.get("head_dim")
    for name, size in (("hidden_size", hidden), ("head_dim", head)):
        if isinstance(size, int) and size > 0:
            found |= {f"sqrt({name})": math.sqrt(size), f"1/sqrt({name})": 1 / math.sqrt(size)}
    for name, value in config.items():
        if isinstance(value, float) and value and name.endswith(("scale", "multiplier", "factor", "scaling")):
            found |= {name: value, f"1/{name}": 1 / value}
    return found
