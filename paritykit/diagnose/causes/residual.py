"""The residual stream: sums of what a layer was fed with and what its modules made of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.scene import LAYER, Scene
from paritykit.diagnose.trial import Trial

Weights = dict[str, float]
ROUND = (0.0, 1.0, 2.0, 0.5, -1.0)
MOST = 12


def residual(scene: Scene) -> Iterator[Trial]:
    """A summand left out, counted twice, scaled, or another in its place; a module whose output is not used."""
    terms = sum_of(scene)
    if terms is None:
        if not scene.port and _contains(scene):
            yield Trial("with zeros in its place", lambda case: 0 * scene.reference(scene.point, case))
        return
    stream = streams(scene)
    for name in stream:
        if name not in terms or len(terms) > 1:
            yield Trial(f"with {short(scene, name)} alone", partial(combined, scene, {name: 1.0}))
    for first, second in combinations(stream, 2):
        for weights in _round_weights(first, second):
            if weights != terms:
                label = f"with {words(scene, weights)} instead of {words(scene, terms)}"
                yield Trial(label, partial(combined, scene, weights))
    yield from _fitted(scene, terms)


def sum_of(scene: Scene) -> Weights | None:
    """The two points that the scene's is the sum of in the reference; the one it is, where it should be that one."""
    return scene.once("sum", lambda: _sum_of(scene))


def _sum_of(scene: Scene) -> Weights | None:
    point = scene.points[scene.point]
    if point.source:
        return {point.source: 1.0} if scene.located != scene.module else None
    for first, second in combinations(streams(scene), 2):
        weights = {first: 1.0, second: 1.0}
        if reproduces(scene, scene.point, partial(combined, scene, weights)):
            return weights
    return None


def streams(scene: Scene) -> list[str]:
    """Points as wide as the scene's that were made before it in its layer or at the end of the one before."""
    return scene.once("streams", lambda: _streams(scene))


def _streams(scene: Scene) -> list[str]:
    keys = list(scene.points)
    width, before = scene.width(scene.point), keys[: keys.index(scene.point)]
    source = scene.points[scene.point].source
    layer = _layer(source or scene.point)
    own = [k for k in before if _layer(k) == layer and scene.width(k) == width and _distinct(scene, k)]
    entry = next((scene.points[k].source or k for k in before if _layer(k) == layer and k.endswith("#input")), "")
    found = [entry, *own] if entry and scene.width(entry) == width else own
    return [k for k in dict.fromkeys(found) if k != scene.point or source][:MOST]


def _distinct(scene: Scene, key: str) -> bool:
    return not scene.points[key].source and "_cache" not in scene.points[key].port


def _layer(key: str) -> str:
    found = LAYER.match(key)
    return found[1] if found else ""


def _contains(scene: Scene) -> bool:
    """Whether the module has others inside, so that its output is theirs."""
    return any(p.module.startswith(f"{scene.module}.") for p in scene.points.values())


def _round_weights(first: str, second: str) -> Iterator[Weights]:
    for a in (1.0, 2.0, -1.0):
        for b in (1.0, 2.0, -1.0):
            if (a, b) not in ((2.0, 2.0), (-1.0, -1.0)):
                yield {first: a, second: b}


def combined(scene: Scene, weights: Weights, case: str) -> torch.Tensor:
    """The weighted sum of some points."""
    return torch.stack([scene.reference(name, case) * weight for name, weight in weights.items()]).sum(0)


def _fitted(scene: Scene, terms: Weights) -> Iterator[Trial]:
    """The sum's own terms with fitted weights."""
    if len(terms) < 2:
        return
    names = list(terms)
    parts = [torch.cat([scene.reference(n, c) for c in scene.cases]).double() for n in names]
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1)
    flat = torch.stack([p[rows].flatten() for p in parts], dim=1)
    found = torch.linalg.lstsq(flat, theirs[rows].flatten()[:, None]).solution.flatten().tolist()
    weights = {n: snapped(w) for n, w in zip(names, found, strict=True)}
    label = f"with {words(scene, weights)} instead of {words(scene, terms)}"
    yield Trial(label, partial(combined, scene, weights), free=1)


def snapped(weight: float) -> float:
    """A round number, where a weight is near one."""
    return next((r for r in ROUND if abs(weight - r) < 1e-4), weight)


def words(scene: Scene, weights: Weights) -> str:
    """A weighted sum as people write it."""
    parts = [f"{'' if w == 1 else f'{w:.4g} x '}{short(scene, n)}" for n, w in weights.items() if w]
    return " + ".join(parts) or "nothing"


def short(scene: Scene, key: str) -> str:
    """A point without the path of the layer that it shares with the scene."""
    layer = _layer(scene.points[scene.point].source or scene.point)
    if key == layer or key.startswith(f"{layer}."):
        return key[len(layer) + 1 :] or f"layer {layer.rpartition('.')[2]}"
    return key.removesuffix("#input") if key == point_key(key.partition("#")[0]) else key
