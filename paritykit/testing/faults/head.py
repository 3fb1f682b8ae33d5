"""Mistakes in embedding, output head and logits."""

from __future__ import annotations

import torch

from paritykit.testing.faults import needs
from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

HEAD = {"kind": "embedding", "point": "lm_head", "checks": ("modules", "logits"), "graded": True}
LOGITS = {"kind": "scale", "point": "#logits", "checks": ("logits",), "graded": True}


@fault(
    "embedding-scale-missing",
    kind="scale",
    cause="scale-factor",
    seen=("vLLM #34813",),
    point="model.embed_tokens",
    checks=("modules", "logits"),
    needs=(needs.SCALED_EMBEDDING,),
    graded=True,
)
def embedding_scale(site: Site) -> None:
    """The embedding is not multiplied by sqrt(hidden)."""
    site.on_embedding_scale(lambda _: 1.0)


@fault(
    "embedding-rows-shifted",
    kind="embedding",
    cause="vocab-shard",
    point="model.embed_tokens",
    checks=("modules", "logits"),
    graded=True,
)
def embedding_shifted(site: Site) -> None:
    """Every token is embedded as the one before it in the vocabulary."""
    embedding = site.embedding
    right_of = embedding.forward
    site.on_output(embedding, lambda _, ids: right_of((ids - 1).clamp(min=0)))


@fault("head-permuted", cause="lm-head", **HEAD)
def permuted(site: Site) -> None:
    """The head's rows are off by one: every logit is another token's."""
    site.on_head(lambda right, *_: right.roll(1, dims=-1))


@fault(
    "head-of-the-embedding",
    cause="weight-shared-wrongly",
    seen=("SGLang #15398", "SGLang #18024"),
    needs=(needs.UNTIED,),
    **HEAD,
)
def of_the_embedding(site: Site) -> None:
    """The embedding is copied over a head that is not tied to it."""
    weight = site.embedding.weight
    site.on_head(lambda _, hidden, product: product(hidden, weight))


@fault(
    "head-never-written",
    cause="lm-head",
    seen=("vLLM #3344", "SGLang #5759", "mlx-lm #1143"),
    needs=(needs.TIED,),
    **HEAD,
)
def never_written(site: Site) -> None:
    """The tie of head and embedding is not seen, and the head keeps what memory held."""
    weight = site.embedding.weight
    memory = torch.Generator().manual_seed(0)
    other = (torch.randn(weight.shape, generator=memory) * weight.shape[1] ** -0.5).to(weight)
    site.on_head(lambda _, hidden, product: product(hidden, other))


@fault(
    "head-in-half-precision", cause="dtype-rounding", seen=("vLLM #19592", "Fast-LLM #525"), **{**HEAD, "kind": "dtype"}
)
def in_half(site: Site) -> None:
    """A head that is to be float32 is kept in bfloat16."""
    site.on_head(lambda right, *_: right.bfloat16().to(right.dtype))


@fault("logits-scaled", cause="scale-factor", seen=("mlx-lm #764",), **LOGITS)
def scaled(site: Site) -> None:
    """The logits are multiplied by a factor that is meant for another head."""
    cap = needs.final_cap(site.model.config)
    site.on_logits(lambda raw: 1.1 * (raw if cap is None else torch.tanh(raw / cap) * cap))


@fault("logits-softcap-missing", cause="softcap", needs=(needs.FINAL_CAP,), **LOGITS)
def cap_missing(site: Site) -> None:
    """The config's cap on logits is not applied."""
    site.on_logits(lambda raw: raw)


@fault("logits-softcap-added", cause="softcap", needs=(needs.NO_FINAL_CAP,), **LOGITS)
def cap_added(site: Site) -> None:
    """Logits are capped though this model has no cap: no choice changes, all odds do."""
    site.on_logits(lambda raw: torch.tanh(raw / 3) * 3)
