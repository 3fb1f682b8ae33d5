"""Fewer bits than both sides are said to compute in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from paritykit.diagnose.bench.linear import Linear, linear_of
from paritykit.diagnose.bench.norm import Norm, norm_of
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import Trial

HALVES = (torch.bfloat16, torch.float16)
WIDE = ("float32", "float64")
ROUNDINGS = 8
"""Roundings that one number may have been through."""


def rounding(scene: Scene) -> Iterator[Trial]:
    """Every number of the candidate is one of half precision, near the reference's; inputs or weight rounded."""
    if scene.candidate_capture.point(scene.rules[scene.point].candidate).dtype not in WIDE:
        return
    for half in HALVES:
        name = str(half).removeprefix("torch.")
        yield Trial(f"rounded to {name}", partial(_representable, scene, half))
        norm = norm_of(scene, scene.module) if not scene.port else None
        if norm is not None:
            yield Trial(f"with the norm computed in {name}", partial(_norm, norm, half))
        linear = linear_of(scene, scene.module) if not scene.port else None
        if linear is not None:
            yield Trial(f"with a weight rounded to {name}", partial(_linear, linear, half, inputs=False))
            yield Trial(f"with weight and input rounded to {name}", partial(_linear, linear, half, inputs=True))


def _representable(scene: Scene, half: torch.dtype, case: str) -> torch.Tensor:
    """The candidate's numbers rounded, where that is as near to the reference as rounding may be.

    That they are all rounded already is no chance: of 65,536 numbers of float32 one is also one of bfloat16.
    """
    ours, theirs = scene.reference(scene.point, case), scene.candidate(scene.point, case)
    rounded = theirs.to(half).to(theirs.dtype)
    step = ROUNDINGS * torch.finfo(half).eps
    usual = ours.pow(2).mean(1, keepdim=True).sqrt()
    near = (rounded - ours).abs() <= step * torch.maximum(ours.abs(), usual)
    return torch.where(near, rounded, ours)


def _norm(norm: Norm, half: torch.dtype, case: str) -> torch.Tensor:
    x, scene = norm.scene.input_of(norm.module, case), norm.scene
    bias = None if norm.bias is None else norm.bias.to(half)
    narrow = replace(norm, weight=norm.weight.to(half), bias=bias).output(x.to(half))
    return scene.reference(scene.point, case) + narrow.to(x.dtype) - norm.output(x)


def _linear(linear: Linear, half: torch.dtype, case: str, *, inputs: bool) -> torch.Tensor:
    weight = linear.weight.to(half).to(linear.weight.dtype)
    x = linear.scene.input_of(linear.module, case)
    changed = x.to(half).to(x.dtype) if inputs else x
    return linear.scene.reference(linear.scene.point, case) + linear.output(changed, weight) - linear.output(x)
