"""Mistakes in routing to experts and in what they give."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from paritykit.testing.faults import needs
from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

EXPERTS = {
    "kind": "moe",
    "point": "model.layers.{layer}.mlp.experts",
    "checks": ("modules", "logits"),
    "graded": True,
}
ROUTED = {**EXPERTS, "cause": "moe-routing", "needs": (needs.EXPERTS,)}
SCALED = {**EXPERTS, "cause": "moe-scale", "needs": (needs.EXPERTS,)}
LATE = 16


def chosen(site: Site) -> int:
    """How many experts a token goes to."""
    experts = getattr(site.model.config, "experts", None)
    return int(experts.chosen if experts is not None else site.model.config.num_experts_per_tok)


@fault("experts-swapped", **ROUTED)
def swapped(site: Site) -> None:
    """Two experts' weights lie in each other's place."""

    def wrong(run: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        order = list(range(logits.shape[-1]))
        order[1], order[3] = order[3], order[1]
        found: torch.Tensor = run(x, logits[..., order])
        return found

    site.on_experts(wrong)


@fault("experts-one-too-few", **{**ROUTED, "needs": (needs.EXPERTS, needs.TWO_OF_EXPERTS)})
def too_few(site: Site) -> None:
    """Tokens go to one expert fewer than the config says."""
    count = chosen(site)

    def wrong(run: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        best, places = logits.topk(count - 1, dim=-1)
        found: torch.Tensor = run(x, torch.full_like(logits, -40.0).scatter(-1, places, best))
        return found

    site.on_experts(wrong)


@fault("experts-of-the-least", seen=("SGLang #3705",), **ROUTED)
def least(site: Site) -> None:
    """The experts with the smallest odds are chosen: the mask of groups is filled with zeros."""
    site.on_experts(lambda run, x, logits: run(x, -logits))


@fault("experts-bias-unused", seen=("vLLM #21586",), **ROUTED)
def biased(site: Site) -> None:
    """A bias that corrects the choice of experts is added where the model has none."""

    def wrong(run: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = run(x, logits + torch.linspace(-1.5, 1.5, logits.shape[-1]).to(logits))
        return found

    site.on_experts(wrong)


@fault("experts-late-tokens-lost", seen=("vllm-ascend #11391",), **ROUTED)
def late_lost(site: Site) -> None:
    """Beyond so many tokens, the operator that chooses experts gives the first ones."""

    def wrong(run: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        first = torch.arange(logits.shape[-1], 0, -1).to(logits).expand_as(logits)
        late = (torch.arange(len(logits), device=logits.device) >= LATE)[:, None]
        found: torch.Tensor = run(x, torch.where(late, first, logits))
        return found

    site.on_experts(wrong)


@fault("experts-not-renormalised", **{**SCALED, "needs": (needs.EXPERTS, needs.RENORMALISED)})
def not_renormalised(site: Site) -> None:
    """The chosen experts' shares do not sum to 1."""
    count = chosen(site)

    def wrong(run: Any, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        share = logits.float().softmax(-1).topk(count, dim=-1).values.sum(-1, keepdim=True)
        found: torch.Tensor = run(x, logits) * share.to(x.dtype)
        return found

    site.on_experts(wrong)


@fault("experts-scale", seen=("SGLang #8333", "SGLang #8511", "vLLM #43769"), **SCALED)
def scale(site: Site) -> None:
    """The factor on routed experts is left out by one backend, or applied by two."""
    site.on_experts(lambda run, x, logits: run(x, logits) * 2.5)


@fault("experts-fed-the-residual", seen=("vLLM #28740", "vLLM #40794"), **{**ROUTED, "cause": "unknown"})
def overwritten(site: Site) -> None:
    """Experts are fed a tensor that was overwritten since."""
    site.on_experts(lambda run, x, logits: run(x.roll(1, dims=0), logits))


@fault(
    "experts-routed-in-half-precision",
    seen=("vLLM #23640", "vLLM #25936"),
    **{**ROUTED, "kind": "dtype", "cause": "dtype-rounding"},
)
def in_half(site: Site) -> None:
    """The router's logits are rounded to bfloat16 before the choice."""
    site.on_experts(lambda run, x, logits: run(x, logits.bfloat16().to(logits.dtype)))


@fault(
    "experts-activation",
    seen=("vLLM #41574",),
    engines=("nano",),
    **{**ROUTED, "kind": "activation", "cause": "activation-kind"},
)
def activation(site: Site) -> None:
    """The experts' gate goes through another activation than the dense layers'."""
    site.on_activation(functional.gelu)
