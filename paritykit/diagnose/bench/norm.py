"""A norm of the reference: RMS or layer norm, whose weight may be kept without its 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.calibrate import moved, reproduces
from paritykit.diagnose.scene import Scene

EPS_NAMES = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps", "layernorm_epsilon")
USUAL_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 0.0)


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(mean square + eps) * (offset + weight) + bias`` over stretches of ``size``.

    ``centred``: the mean is subtracted, as in a layer norm.
    """

    scene: Scene
    module: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    offset: float
    centred: bool

    @property
    def size(self) -> int:
        """Features that are normed together."""
        return int(self.weight.shape[0])

    def output(self, x: torch.Tensor, *, size: int | None = None) -> torch.Tensor:
        """``[positions, features]``; ``size`` norms stretches of another length."""
        length = size or self.size
        parts = x.reshape(x.shape[0], -1, length)
        parts = parts - parts.mean(-1, keepdim=True) if self.centred else parts
        parts = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + self.eps)
        factor = self.offset + self.weight
        whole = parts.reshape(x.shape[0], -1, self.size) * factor
        whole = whole if self.bias is None else whole + self.bias
        return whole.reshape(x.shape)

    def changed(self, case: str, **changes: Any) -> torch.Tensor:
        """What the norm would give with other settings."""
        x = self.scene.input_of(self.module, case)
        return moved(self.scene, self.module, self.output(x), replace(self, **changes).output(x), case)


def norm_of(scene: Scene, module: str) -> Norm | None:
    """The norm that ``module`` is; None where it is none of those known."""
    return scene.once(("norm", module), lambda: _norm_of(scene, module))


def _norm_of(scene: Scene, module: str) -> Norm | None:
    weight = scene.parameter(f"{module}.weight")
    if weight is None or weight.dim() != 1 or point_key(module, port="input") not in scene.points:
        return None
    if scene.width(module) != scene.width(point_key(module, port="input")) or scene.width(module) % len(weight):
        return None
    bias = scene.parameter(f"{module}.bias")
    for eps in dict.fromkeys([*config_eps(scene.config), *USUAL_EPS]):
        for centred, offset in ((False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)):
            found = Norm(scene, module, weight, bias, eps, offset, centred)
            if reproduces(scene, module, lambda case, found=found: found.output(scene.input_of(module, case))):  # type: ignore[misc]
                return found
    return None


def config_eps(config: Mapping[str, Any]) -> list[float]:
    """Every norm epsilon that a config names."""
    return [float(config[n]) for n in EPS_NAMES if isinstance(config.get(n), float | int)]
