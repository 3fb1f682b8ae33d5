"""The token embedding of the reference: a row of its weight for each token, times one factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.bench.linear import embedding_weight
from paritykit.diagnose.scene import Scene

PADDING = 64
"""vLLM pads the vocabulary to a multiple of it before it is cut for ranks."""


@dataclass(frozen=True)
class Lookup:
    """``weight`` ``[vocabulary, hidden]`` and the factor of the scene's point."""

    scene: Scene
    weight: torch.Tensor
    factor: float

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[positions, hidden]``; zeros for tokens below 0, the last row for those beyond the vocabulary."""
        found = self.weight[tokens.clamp(0, len(self.weight) - 1)] * self.factor
        return found * (tokens >= 0).to(found)[:, None]

    def edges(self) -> list[int]:
        """Tokens with which a rank's part of the vocabulary may begin, with and without padding."""
        size, ranks = len(self.weight), self.scene.ranks
        wholes = [size, -(-size // PADDING) * PADDING, -(-size // (PADDING * ranks)) * PADDING * ranks]
        parts = [-(-whole // ranks) for whole in wholes]
        return [n for n in dict.fromkeys(p * r for p in parts for r in range(1, ranks)) if n < size]


def lookup_of(scene: Scene) -> Lookup | None:
    """The embedding, where the scene's point is what it gives; None where it is not."""
    return scene.once("lookup", lambda: _lookup_of(scene))


def _lookup_of(scene: Scene) -> Lookup | None:
    weight = embedding_weight(scene)
    if weight is None or weight.dim() != 2 or scene.width(scene.point) != weight.shape[1]:
        return None
    case = scene.cases[0]
    rows, found = weight[scene.tokens(case)], scene.reference(scene.point, case)
    factor = float((rows * found).sum() / rows.pow(2).sum().clamp_min(1e-30))
    made = Lookup(scene, weight, factor)
    return made if reproduces(scene, scene.point, lambda c: made.rows(scene.tokens(c))) else None
