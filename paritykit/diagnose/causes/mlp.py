"""Activations of MLPs: another function, or one that is clamped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

STEPS, ROUNDS = 12, 8
"""Limits that are tried at once, between the nearest of those before."""
LOWEST = 0.5
QUANTILES = 1 << 24
"""Numbers of which torch gives quantiles."""

Function = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Function] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu in its tanh form": partial(functional.gelu, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "squared relu": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "no activation": lambda x: x,
}


def activation_kind(scene: Scene) -> Iterator[Trial]:
    """Another function of the same gate, or the same function of a gate that is clamped."""
    found = gated(scene)
    if found is None:
        return
    name, gate, other = found
    for kind, function in ACTIVATIONS.items():
        if kind != name:
            yield Trial(f"with {kind} instead of {name}", partial(_product, scene, function, gate, other))
    if other:
        yield Trial(
            "with the activation on the other projection", partial(_product, scene, ACTIVATIONS[name], other, gate)
        )
    yield from _clamped(scene, name, gate, other)


def gated(scene: Scene) -> tuple[str, str, str] | None:
    """The activation that makes the scene's point, its gate's point, and that of what it is multiplied with."""
    return scene.once("gated", lambda: _gated(scene))


def _gated(scene: Scene) -> tuple[str, str, str] | None:
    for gate, other in _inputs(scene):
        for name, function in ACTIVATIONS.items():
            if reproduces(scene, scene.point, partial(_product, scene, function, gate, other)):
                return name, gate, other
    return None


def _inputs(scene: Scene) -> Iterator[tuple[str, str]]:
    """Gates that the point may be made of, each with what it may be multiplied with."""
    own = point_key(scene.module, port="input")
    if not scene.port and own in scene.points and scene.parameter(f"{scene.module}.weight") is None:
        yield own, ""
    if scene.port == "input" and not scene.points[scene.point].source:
        parent, keys = scene.module.rpartition(".")[0], list(scene.points)
        before = [k for k in keys[: keys.index(scene.point)] if k.startswith(f"{parent}.") and "#" not in k]
        alike = [k for k in before if scene.width(k) == scene.width(scene.point)]
        yield from ((a, b) for a in alike for b in alike if a != b)
        yield from ((a, "") for a in alike)


def _product(scene: Scene, function: Function, gate: str, other: str, case: str) -> torch.Tensor:
    activated = function(scene.reference(gate, case))
    return activated * scene.reference(other, case) if other else activated


def _clamped(scene: Scene, name: str, gate: str, other: str) -> Iterator[Trial]:
    """The limit above which the candidate's numbers grow no more: the smallest gate that gives another result."""
    if other:
        return
    x = torch.cat([scene.reference(gate, c) for c in scene.cases]).double()
    ours = torch.cat([scene.reference(scene.point, c) for c in scene.cases]).double()
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1)
    limit = _limit(ACTIVATIONS[name], x[rows], (theirs - ours)[rows])
    function = ACTIVATIONS[name]
    for value in dict.fromkeys([round(limit, 2), limit]):
        free = 0 if value == round(limit, 2) else 1
        label = f"with the gate clamped at {value:g}"
        yield Trial(label, lambda case, v=value: function(scene.reference(gate, case).clamp(max=v)), free=free)  # type: ignore[misc]
        label = f"with the gate clamped to -{value:g} to {value:g}"
        yield Trial(label, lambda case, v=value: function(scene.reference(gate, case).clamp(-v, v)), free=free)  # type: ignore[misc]


def _limit(function: Function, x: torch.Tensor, difference: torch.Tensor) -> float:
    """The limit of ``x`` whose effect is most like the difference, whatever the share of it."""

    def alike(limit: float) -> float:
        effect = function(x.clamp(max=limit)) - function(x)
        size = float(effect.norm() * difference.norm())
        return float((effect * difference).sum()) / size if size else 0.0

    low, high = float(x.quantile(LOWEST)) if x.numel() <= QUANTILES else float(x.mean()), float(x.max())
    for _ in range(ROUNDS):
        tried = torch.linspace(low, high, STEPS).tolist()
        best = max(tried, key=alike)
        step = (high - low) / (STEPS - 1)
        low, high = best - step, best + step
    return float(best)
