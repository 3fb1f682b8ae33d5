"""Mistakes in the residual stream."""

from __future__ import annotations

import torch

from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

ALWAYS = {
    "kind": "residual",
    "cause": "residual",
    "point": "model.layers.{layer}",
    "checks": ("modules", "logits"),
    "graded": True,
}


@fault("residual-dropped", seen=("SGLang #19070", "vLLM #37622"), **ALWAYS)
def dropped(site: Site) -> None:
    """The residual is not added to the attention's output."""
    site.on_residual(0, lambda _, update: update)


@fault("residual-dropped-after-mlp", **ALWAYS)
def dropped_after_mlp(site: Site) -> None:
    """The residual is not added to the MLP's output."""
    site.on_residual(1, lambda _, update: update)


@fault("residual-scaled", **ALWAYS)
def scaled(site: Site) -> None:
    """The residual is multiplied by a factor of another family."""
    site.on_residual(0, lambda residual, update: 0.5 * residual + update)


@fault("residual-of-the-norm", **ALWAYS)
def normed(site: Site) -> None:
    """The residual is taken after the norm, where it branches off before it."""
    weight, eps = site.norm_facts(site.block.input_layernorm)

    def wrong(residual: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + eps) * weight + update

    site.on_residual(0, wrong)


@fault("residual-added-twice", **ALWAYS)
def added_twice(site: Site) -> None:
    """The residual is added once by the fused norm and once more after it."""
    site.on_residual(1, lambda residual, update: 2 * residual + update)


@fault("layer-skipped", seen=("vLLM #10327",), **ALWAYS)
def layer_skipped(site: Site) -> None:
    """One layer is left out, as where two stages disagree on who has it."""
    site.on_layer(lambda _, hidden: hidden)


@fault(
    "residual-in-half-precision",
    seen=("mlx-lm #102",),
    **{**ALWAYS, "kind": "dtype", "cause": "dtype-rounding"},
)
def in_half(site: Site) -> None:
    """The residual stream is kept in bfloat16 in a float32 model."""
    site.on_residual(1, lambda residual, update: (residual + update).bfloat16().to(update.dtype))
