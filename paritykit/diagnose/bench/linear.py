"""A linear layer of the reference: its input, weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.scene import Scene

SMALLEST = 1e-6
"""Share of an error below which nothing is said of it."""


@dataclass(frozen=True)
class Linear:
    """``weight`` ``[out, in]``, ``bias`` ``[out]``. Its numbers are the reference's, as was checked."""

    scene: Scene
    module: str
    weight: torch.Tensor
    bias: torch.Tensor | None

    def output(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """``[positions, out]`` of ``x`` with the bias, with another weight where one is given."""
        product = x @ (self.weight if weight is None else weight).T
        return product if self.bias is None else product + self.bias

    def with_weight(self, case: str, weight: torch.Tensor) -> torch.Tensor:
        """What the module would give with another weight: the reference's rows, moved by the product of the change."""
        x = self.scene.input_of(self.module, case)
        return self.scene.reference(self.module, case) + x @ (weight - self.weight).T

    def with_input(self, case: str, x: torch.Tensor) -> torch.Tensor:
        """What the module would give for another input, made likewise."""
        change = x - self.scene.input_of(self.module, case)
        return self.scene.reference(self.module, case) + change @ self.weight.T


def linear_of(scene: Scene, module: str) -> Linear | None:
    """The linear layer that ``module`` is; None where it is none, or its weight does not give its numbers."""
    return scene.once(("linear", module), lambda: _linear_of(scene, module))


def _linear_of(scene: Scene, module: str) -> Linear | None:
    if point_key(module, port="input") not in scene.points or module not in scene.points:
        return None
    weight = scene.parameter(f"{module}.weight")
    if weight is None:
        weight = embedding_weight(scene) if is_head(scene, module) else None
    if weight is None or weight.dim() != 2:
        return None
    weight = weight.T if scene.kind(module) == "Conv1D" else weight
    if weight.shape != (scene.width(module), scene.width(point_key(module, port="input"))):
        return None
    found = Linear(scene, module, weight, scene.parameter(f"{module}.bias"))
    right = reproduces(scene, module, lambda case: found.output(scene.input_of(module, case)))
    return found if right else None


def linear_shares(x: torch.Tensor, error: torch.Tensor, *, noise: float) -> tuple[float, float]:
    """How much of ``error`` ``[positions, out]`` a matrix makes of ``x`` ``[positions, in]``: shares of its square.

    The first is what the other positions say of each, by ridge regression; the second what they would say of it if the
    error were such a product beside independent ``noise`` (its norm), with any matrix whatever. Both are of what varies
    from position to position, so that a bias counts for nothing.
    """
    x, error = x - x.mean(0), error - error.mean(0)
    kernel, size = x @ x.T, float(error.pow(2).sum())
    made, spread = max(size - noise**2, 0.0), float(kernel.trace())
    if not made or not spread:
        return 0.0, 0.0
    of_noise = torch.eye(len(x)).to(x) * max(noise**2, SMALLEST * made) / len(x)
    # Without their mean the others would give each away: so the mean is taken for unknown, and large.
    of_mean = torch.full_like(kernel, made / len(x))
    inverse = torch.linalg.inv(kernel * made / spread + of_noise + of_mean)
    left = (inverse @ error) / inverse.diagonal()[:, None]
    return 1 - float(left.pow(2).sum()) / size, 1 - float((1 / inverse.diagonal()).sum()) / size


def is_head(scene: Scene, module: str) -> bool:
    """Whether a module gives the logits over the vocabulary."""
    return bool(module == scene.reference_capture.manifest.facts.get("head", "lm_head"))


def embedding_module(scene: Scene) -> str:
    """The reference's token embedding: its first module of that kind; empty where it has none."""
    return next((p.module for p in scene.points.values() if "Embedding" in p.kind and "Rotary" not in p.kind), "")


def embedding_weight(scene: Scene) -> torch.Tensor | None:
    """The token embedding's weight, ``[vocabulary, hidden]``."""
    module = embedding_module(scene)
    return scene.parameter(f"{module}.weight") if module else None
