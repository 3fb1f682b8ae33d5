"""Whether a stand-in gives the reference's own numbers: before that, nothing is made of what it says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paritykit.diagnose.scene import Scene

ITSELF = 0.5
"""Of what is allowed between two engines, how far a stand-in may be from the reference."""


def reproduces(scene: Scene, key: str, compute: Callable[[str], torch.Tensor]) -> bool:
    """Whether ``compute(case)`` gives the reference's rows of ``key``, in every case of the scene."""
    wrong = right = 0.0
    for case in scene.cases:
        expected = scene.reference(key, case)
        found = compute(case)
        rows = expected.isfinite().all(1)
        if found.shape != expected.shape or not bool(found[rows].isfinite().all()) or not rows.any():
            return False
        found, expected = found[rows], expected[rows]
        wrong += float((found - expected).double().norm() ** 2)
        right += float(expected.double().norm() ** 2)
    return wrong <= (ITSELF * scene.allowed.whole) ** 2 * right


def moved(scene: Scene, key: str, right: torch.Tensor, changed: torch.Tensor, case: str) -> torch.Tensor:
    """The reference's rows, moved by what a change does to a stand-in: its own rounding drops out."""
    return scene.reference(key, case) + (changed - right)
