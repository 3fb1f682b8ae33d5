"""Mistakes in the norms."""

from __future__ import annotations

import torch

from paritykit.testing.faults import needs
from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

LAYER = "model.layers.{layer}"
ALWAYS = {"kind": "norm", "checks": ("modules", "logits"), "graded": True}
INPUT = {**ALWAYS, "point": f"{LAYER}.input_layernorm"}


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last axis, in the dtype of ``x``."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@fault(
    "norm-eps",
    cause="norm-eps",
    seen=("SGLang #9884",),
    needs=(needs.OWN_EPS,),
    **INPUT,
)
def eps(site: Site) -> None:
    """The norm's epsilon is a constant, 1e-6, and not the one in the config."""
    norm = site.block.input_layernorm
    weight, _ = site.norm_facts(norm)
    site.on_norm(norm, lambda x: rms(x, weight, needs.DEFAULT_EPS))


@fault(
    "norm-offset-added",
    cause="norm-offset",
    seen=("utensils/mold #1074",),
    **INPUT,
)
def offset_added(site: Site) -> None:
    """1 is added to norm weights that hold it already, or need none."""
    norm = site.block.input_layernorm
    weight, own = site.norm_facts(norm)
    site.on_norm(norm, lambda x: rms(x, weight + 1, own))


@fault(
    "norm-offset-missing",
    cause="norm-offset",
    needs=(needs.OFFSET,),
    **INPUT,
)
def offset_missing(site: Site) -> None:
    """Norm weights that are stored without their 1 are used as they are."""
    norm = site.block.input_layernorm
    weight, own = site.norm_facts(norm)
    site.on_norm(norm, lambda x: rms(x, weight - 1, own))


@fault(
    "norm-kind",
    cause="norm-kind",
    **INPUT,
)
def kind(site: Site) -> None:
    """The mean is subtracted, as in a layer norm, where the model has an RMS norm."""
    norm = site.block.input_layernorm
    weight, own = site.norm_facts(norm)
    site.on_norm(norm, lambda x: rms(x - x.mean(-1, keepdim=True), weight, own))


@fault("norm-weight-unused", cause="norm-kind", **INPUT)
def weight_unused(site: Site) -> None:
    """The norm's weight is loaded and never multiplied with."""
    norm = site.block.input_layernorm
    weight, own = site.norm_facts(norm)
    site.on_norm(norm, lambda x: rms(x, torch.ones_like(weight), own))


@fault(
    "norm-skipped",
    cause="norm-kind",
    seen=("vLLM #40411",),
    point=f"{LAYER}.post_attention_layernorm",
    **ALWAYS,
)
def skipped(site: Site) -> None:
    """The norm between attention and MLP is left out."""
    site.on_norm(site.block.post_attention_layernorm, lambda x: x)


@fault(
    "norm-after-mlp-skipped",
    cause="norm-kind",
    seen=("vLLM #8106", "TGI #2459"),
    point=f"{LAYER}.post_feedforward_layernorm",
    needs=(needs.SANDWICH,),
    **ALWAYS,
)
def after_skipped(site: Site) -> None:
    """The norm that follows the MLP is left out."""
    site.on_norm(site.block.post_feedforward_layernorm, lambda x: x)


@fault("norm-final-skipped", cause="norm-kind", point="model.norm", **ALWAYS)
def final_skipped(site: Site) -> None:
    """The norm after the last layer is left out."""
    site.on_norm(site.final_norm, lambda x: x)


@fault(
    "norm-of-keys-skipped",
    cause="norm-kind",
    point=f"{LAYER}.self_attn.k_norm",
    needs=(needs.QK_NORM,),
    **ALWAYS,
)
def keys_skipped(site: Site) -> None:
    """Queries are normed and keys are not."""
    site.on_norm(site.attention.k_norm, lambda x: x)


@fault(
    "norm-in-half-precision",
    kind="dtype",
    cause="dtype-rounding",
    seen=("vLLM #42379", "vLLM #27627"),
    point=f"{LAYER}.input_layernorm",
    checks=("modules", "logits"),
    graded=True,
)
def in_half(site: Site) -> None:
    """The norm computes in bfloat16 and its sum of squares with it."""
    norm = site.block.input_layernorm
    weight, own = site.norm_facts(norm)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        half = x.bfloat16()
        mean = half.pow(2).mean(-1, keepdim=True)
        return (half * torch.rsqrt(mean + own) * weight.bfloat16()).to(x.dtype)

    site.on_norm(norm, wrong)
