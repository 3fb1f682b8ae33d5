"""The small layers: RMS norm, activations, the gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.linear import MergedColumnParallelLinear, RowParallelLinear
from paritykit.engines.nano.parameter import Build, load_whole

ACTIVATION_FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, over the last axis (arXiv 1910.07467).

    With an ``offset`` (Gemma) the weight is ``offset + weight`` and the product is rounded once, at its end.
    """

    def __init__(self, size: int, *, eps: float, offset: float, build: Build) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = build.parameter(size, loader=load_whole)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normed ``x``, of the same shape and dtype; computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight.to(wide.dtype))).to(x.dtype)
        return self.weight * normed.to(x.dtype)


class Activation(nn.Module):
    """The activation of a gate, by its name in the config."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATION_FUNCTIONS[name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, activated."""
        return self.function(x)


class MLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, gate and up in one product."""

    def __init__(self, config: NanoConfig, build: Build) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(hidden, [width, width], bias=config.mlp_bias, build=build)
        self.act_fn = Activation(config.activation)
        self.down_proj = RowParallelLinear(width, hidden, bias=config.mlp_bias, build=build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        gate, up = self.gate_up_proj(x).split(self.gate_up_proj.widths, dim=-1)
        down: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return down


def softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap * tanh(x / cap)``, or ``x`` where there is no cap."""
    return x if cap is None else torch.tanh(x / cap) * cap
