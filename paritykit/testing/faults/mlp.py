"""Mistakes in projections, biases, gates and activations."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from paritykit.testing.faults import needs
from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

LAYER = "model.layers.{layer}"
ALWAYS = {"kind": "activation", "checks": ("modules", "logits"), "graded": True}
ACTIVATION = {**ALWAYS, "point": f"{LAYER}.mlp.act_fn"}
BIASED = {"kind": "weights", "checks": ("modules", "logits"), "graded": True, "needs": (needs.BIAS,)}


def value_columns(site: Site) -> slice:
    """The columns of the fused projection that are values, on this rank."""
    qkv = site.attention.qkv_proj
    width = qkv.widths[2] if hasattr(qkv, "widths") else qkv.output_sizes[2] // qkv.tp_size
    return slice(-width, None)


@fault(
    "gate-up-swapped",
    cause="gate-up-swapped",
    seen=("vLLM #29273",),
    point=f"{LAYER}.mlp.gate_proj",
    needs=(needs.DENSE,),
    **ALWAYS,
)
def gate_up_swapped(site: Site) -> None:
    """Gate and up are taken for each other in the fused projection."""
    site.on_output(site.block.mlp.gate_up_proj, lambda right, *_: torch.cat(right.chunk(2, dim=-1)[::-1], dim=-1))


@fault(
    "gate-up-interleaved",
    cause="gate-up-swapped",
    seen=("vLLM #29273",),
    point=f"{LAYER}.mlp.gate_proj",
    needs=(needs.DENSE,),
    **ALWAYS,
)
def gate_up_interleaved(site: Site) -> None:
    """Gate and up are taken from the fused projection column by column, where each is a half."""

    def wrong(right: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.cat((right[..., ::2], right[..., 1::2]), dim=-1)

    site.on_output(site.block.mlp.gate_up_proj, wrong)


@fault(
    "activation-kind", cause="activation-kind", seen=("vLLM #32686", "vLLM #40245"), needs=(needs.DENSE,), **ACTIVATION
)
def relu(site: Site) -> None:
    """The gate goes through relu."""
    site.on_activation(functional.relu)


@fault("activation-of-another-family", cause="activation-kind", needs=(needs.DENSE,), **ACTIVATION)
def other(site: Site) -> None:
    """The gate goes through silu or gelu, whichever the model has not."""
    gelu = uses_gelu(site.model.config)
    site.on_activation(functional.silu if gelu else functional.gelu)


@fault(
    "activation-exact-gelu",
    cause="activation-kind",
    seen=("vLLM #41574",),
    needs=(needs.GELU_TANH, needs.DENSE),
    **ACTIVATION,
)
def exact(site: Site) -> None:
    """The exact gelu is used where the model has the tanh form."""
    site.on_activation(functional.gelu)


@fault(
    "activation-clamped",
    cause="activation-kind",
    seen=("vLLM #42855", "transformers #40197"),
    needs=(needs.DENSE,),
    **ACTIVATION,
)
def clamped(site: Site) -> None:
    """The gate is clamped by a limit that another model of the family has."""
    gelu = uses_gelu(site.model.config)

    def wrong(gate: torch.Tensor) -> torch.Tensor:
        limited = gate.clamp(max=1.5)
        return functional.gelu(limited, approximate="tanh") if gelu else functional.silu(limited)

    site.on_activation(wrong)


@fault(
    "mlp-skipped",
    kind="residual",
    cause="residual",
    point=f"{LAYER}.mlp",
    checks=("modules", "logits"),
    graded=True,
    needs=(needs.DENSE,),
)
def mlp_skipped(site: Site) -> None:
    """The MLP's output is not used."""
    site.on_output(site.block.mlp, lambda right, *_: right * 0)


@fault(
    "bias-missing",
    cause="bias-missing",
    seen=("vLLM #8442", "ANEForge #253"),
    point=f"{LAYER}.self_attn.v_proj",
    **BIASED,
)
def bias_missing(site: Site) -> None:
    """The bias of the values is not added."""
    columns, bias = value_columns(site), site.attention.qkv_proj.bias

    def wrong(right: torch.Tensor, *_: object) -> torch.Tensor:
        right[..., columns] -= bias[columns]
        return right

    site.on_output(site.attention.qkv_proj, wrong)


@fault("bias-doubled", cause="bias-doubled", point=f"{LAYER}.self_attn.v_proj", **BIASED)
def bias_doubled(site: Site) -> None:
    """The bias of the values is added twice, by the kernel and after it."""
    columns, bias = value_columns(site), site.attention.qkv_proj.bias

    def wrong(right: torch.Tensor, *_: object) -> torch.Tensor:
        right[..., columns] += bias[columns]
        return right

    site.on_output(site.attention.qkv_proj, wrong)


@fault(
    "bias-never-written",
    kind="weights",
    cause="weight-not-loaded",
    seen=("vLLM #740", "vLLM #1501"),
    point=f"{LAYER}.self_attn.q_proj",
    checks=("modules", "logits"),
    graded=True,
    needs=(needs.NO_BIAS,),
)
def bias_never_written(site: Site) -> None:
    """Linear layers are built with a bias that the checkpoint has not, and it keeps what memory held."""

    def wrong(right: torch.Tensor, *_: object) -> torch.Tensor:
        memory = torch.Generator().manual_seed(0)
        return right + torch.randn(right.shape[-1], generator=memory).to(right)

    site.on_output(site.attention.qkv_proj, wrong)


@fault(
    "linear-in-half-precision",
    kind="dtype",
    cause="dtype-rounding",
    seen=("vLLM #35617",),
    point=f"{LAYER}.mlp.down_proj",
    checks=("modules", "logits"),
    graded=True,
    needs=(needs.DENSE,),
)
def linear_in_half(site: Site) -> None:
    """One projection computes in bfloat16 in a float32 model."""
    site.on_output(site.block.mlp.down_proj, lambda right, *_: right.bfloat16().to(right.dtype))


def uses_gelu(config: Any) -> bool:
    """Whether a model's gate goes through a form of gelu, from nano's config or a Hugging Face one.

    >>> from types import SimpleNamespace
    >>> [uses_gelu(SimpleNamespace(**{name: "gelu"})) for name in ("activation", "hidden_act", "hidden_activation")]
    [True, True, True]
    >>> uses_gelu(SimpleNamespace(hidden_act="silu"))
    False
    """
    return any("gelu" in str(getattr(config, n, "")) for n in ("activation", "hidden_activation", "hidden_act"))
