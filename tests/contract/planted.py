"""Mistakes planted in a Hugging Face model, by the names that checks promise to detect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LAYER = 1


def layer(model: Any) -> Any:
    return model.model.layers[LAYER]


def norm_eps(model: Any) -> None:
    layer(model).input_layernorm.variance_epsilon = 1e-6


def gate_up_swapped(model: Any) -> None:
    mlp = layer(model).mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight


def bias_missing(model: Any) -> None:
    layer(model).self_attn.v_proj.bias.data.zero_()


def attention_scale(model: Any) -> None:
    layer(model).self_attn.scaling *= 1.1


def rope_theta(model: Any) -> None:
    """Cos and sin of a slightly longer position, for one layer only."""

    def stretched(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        angle = torch.atan2(sin, cos) * 1.02
        return args, {**kwargs, "position_embeddings": (angle.cos(), angle.sin())}

    layer(model).self_attn.register_forward_pre_hook(stretched, with_kwargs=True)


def residual(model: Any) -> None:
    norm = layer(model).post_attention_layernorm
    norm.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


def lm_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _, args, output: output.roll(1, dims=-1))


def position_shift(model: Any) -> None:
    def shifted(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args[0].roll(1, dims=1), *args[1:]), kwargs

    model.model.embed_tokens.register_forward_pre_hook(shifted, with_kwargs=True)


def softcap(model: Any) -> None:
    """A cap where the model has none: no choice changes, every distribution does."""
    model.lm_head.register_forward_hook(lambda _, args, output: torch.tanh(output / 3) * 3)


FAULTS: dict[str, Callable[[Any], None]] = {
    "norm-eps": norm_eps,
    "gate-up-swapped": gate_up_swapped,
    "bias-missing": bias_missing,
    "attention-scale": attention_scale,
    "rope-theta": rope_theta,
    "residual": residual,
    "lm-head": lm_head,
    "softcap": softcap,
    "position-shift": position_shift,
}
