"""Norms: another epsilon, the 1 of their weight, another kind, or none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from paritykit.diagnose.bench.norm import USUAL_EPS, Norm, norm_of
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial


def _own(scene: Scene) -> Norm | None:
    return norm_of(scene, scene.module) if not scene.port else None


def eps(scene: Scene) -> Iterator[Trial]:
    """Another epsilon: those that are usual, and ten times more or less."""
    norm = _own(scene)
    if norm is None:
        return
    for value in dict.fromkeys([*USUAL_EPS, norm.eps * 10, norm.eps / 10, norm.eps**0.5, norm.eps**2]):
        if value != norm.eps:
            label = f"with a norm epsilon of {value:g} instead of {norm.eps:g}"
            yield Trial(label, partial(norm.changed, eps=value))


def offset(scene: Scene) -> Iterator[Trial]:
    """1 more or less in the weight."""
    norm = _own(scene)
    if norm is None:
        return
    for step in (1.0, -1.0):
        text = "added to" if step > 0 else "missing from"
        yield Trial(f"with 1 {text} the norm's weight", partial(norm.changed, offset=norm.offset + step))


def kind(scene: Scene) -> Iterator[Trial]:
    """The mean subtracted or not, the weight or bias left out, no norm at all, per head or over all heads."""
    norm = _own(scene)
    if norm is None:
        return
    other = "as an RMS norm" if norm.centred else "with the mean subtracted, as in a layer norm"
    yield Trial(f"computed {other}", partial(norm.changed, centred=not norm.centred))
    ones = torch.ones_like(norm.weight)
    yield Trial("with the norm's weight left out", partial(norm.changed, weight=ones, offset=0.0))
    yield Trial("without the norm", lambda case: scene.input_of(scene.module, case))
    if norm.bias is not None:
        yield Trial("with the norm's bias left out", partial(norm.changed, bias=None))
    yield from _stretches(scene, norm)


def _stretches(scene: Scene, norm: Norm) -> Iterator[Trial]:
    width = scene.width(scene.module)
    head = scene.config.get("head_dim")
    for size in dict.fromkeys([width, head, width // scene.ranks]):
        if isinstance(size, int) and size != norm.size and size > 1 and width % size == 0:
            label = f"normed over {size} features at a time instead of {norm.size}"
            yield Trial(label, lambda case, size=size: norm.output(scene.input_of(scene.module, case), size=size))  # type: ignore[misc]
