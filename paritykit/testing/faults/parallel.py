"""Mistakes that show on several ranks only: sums, shards, replicas."""

from __future__ import annotations

from typing import Any

import torch

from paritykit.testing.faults import needs
from paritykit.testing.faults.conditions import TWO_RANKS, TWO_STAGES
from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

LAYER = "model.layers.{layer}"
CHECKS = ("modules", "logits", "tensor_parallel")
RANKS = {"kind": "parallel", "when": TWO_RANKS, "checks": CHECKS, "graded": True}
OUTPUT = {**RANKS, "cause": "tp-reduce", "point": f"{LAYER}.self_attn.o_proj"}

STAGES = {
    "when": TWO_STAGES,
    "checks": ("modules", "logits", "pipeline_parallel"),
    "point": LAYER,
    "needs": (needs.SECOND_STAGE,),
    "graded": True,
}


@fault("reduce-missing", seen=("SGLang #19070",), **OUTPUT)
def missing(site: Site) -> None:
    """Every rank goes on with its own part of the attention's output."""
    site.on_reduce(site.attention.o_proj, lambda partial, _: partial)


@fault("reduce-twice", seen=("vLLM #28277",), **OUTPUT)
def twice(site: Site) -> None:
    """The sum over ranks is summed over ranks again."""
    site.on_reduce(site.attention.o_proj, lambda partial, reduce: reduce(reduce(partial)))


@fault("reduce-averages", **OUTPUT)
def averages(site: Site) -> None:
    """Ranks' parts are averaged, where they are to be summed."""
    site.on_reduce(site.attention.o_proj, lambda partial, reduce: reduce(partial) / site.ranks)


@fault("reduce-gives-zeros", seen=("vLLM #39844", "SGLang #4477"), **OUTPUT)
def zeros(site: Site) -> None:
    """The sum over ranks comes back as zeros."""
    site.on_reduce(site.attention.o_proj, lambda partial, reduce: reduce(partial) * (0 if site.ranks > 1 else 1))


@fault("reduce-loses-a-rank", **OUTPUT)
def loses(site: Site) -> None:
    """One rank's part of the sum does not arrive."""

    def wrong(partial: torch.Tensor, reduce: Any) -> torch.Tensor:
        found: torch.Tensor = reduce(partial * (0 if site.rank == 1 else 1))
        return found

    site.on_reduce(site.attention.o_proj, wrong)


@fault(
    "reduce-missing-after-mlp",
    cause="tp-reduce",
    seen=("SGLang #19070",),
    point=f"{LAYER}.mlp.down_proj",
    needs=(needs.DENSE,),
    **RANKS,
)
def missing_after_mlp(site: Site) -> None:
    """The MLP's output is not summed over ranks, since the next layer's norm was to do it."""
    site.on_reduce(site.block.mlp.down_proj, lambda partial, _: partial)


@fault(
    "reduce-missing-after-experts",
    cause="tp-reduce",
    seen=("vLLM #28277",),
    point=f"{LAYER}.mlp.experts",
    needs=(needs.EXPERTS,),
    engines=("nano",),
    **RANKS,
)
def missing_after_experts(site: Site) -> None:
    """The experts' output is not summed over ranks."""
    site.on_reduce(site.sparse.experts, lambda partial, _: partial)


@fault("bias-on-every-rank", cause="tp-bias", point=f"{LAYER}.self_attn.o_proj", needs=(needs.OUTPUT_BIAS,), **RANKS)
def bias(site: Site) -> None:
    """Every rank adds the whole bias before the sum."""
    linear = site.attention.o_proj
    site.on_output(linear, lambda right, *_: right + (site.ranks - 1) * linear.bias)


@fault("embedding-not-reduced", cause="tp-reduce", point="model.embed_tokens", **RANKS)
def embedding_not_reduced(site: Site) -> None:
    """Every rank goes on with the embeddings that lie in its own part of the vocabulary."""
    site.on_reduce(site.embedding, lambda partial, _: partial)


@fault("vocabulary-shard-shifted", cause="vocab-shard", point="model.embed_tokens", **{**RANKS, "graded": False})
def vocabulary_shifted(site: Site) -> None:
    """A rank takes its part of the vocabulary to begin one token late."""
    if site.rank:
        site.changes.wrap(site.embedding, "forward", lambda right_of, ids: right_of(ids - 1))


@fault("head-parts-exchanged", cause="vocab-shard", seen=("vLLM #18597",), point="lm_head", engines=("nano",), **RANKS)
def exchanged(site: Site) -> None:
    """The ranks' parts of the logits are joined in the wrong order."""

    def wrong(right: torch.Tensor, *_: object) -> torch.Tensor:
        if site.ranks == 1:
            return right
        found: torch.Tensor = right.roll(right.shape[-1] // site.ranks, dims=-1)
        return found

    site.on_head(wrong)


@fault("stage-hands-on-the-update", kind="parallel", cause="residual", seen=("vLLM #37622",), **STAGES)
def hands_on_the_update(site: Site) -> None:
    """A stage hands on what its last layer added, and not the residual under it."""
    site.on_hand_over(lambda hidden, residual: hidden - residual)


@fault("stage-hands-on-the-residual", kind="parallel", cause="residual", **STAGES)
def hands_on_the_residual(site: Site) -> None:
    """A stage hands on the residual, and what its last layer added is lost."""
    site.on_hand_over(lambda _, residual: residual)


@fault("stage-hands-on-half-precision", kind="dtype", cause="dtype-rounding", **STAGES)
def hands_on_rounded(site: Site) -> None:
    """Hidden states go from stage to stage in bfloat16."""
    site.on_hand_over(lambda hidden, _: hidden.bfloat16().to(hidden.dtype))
