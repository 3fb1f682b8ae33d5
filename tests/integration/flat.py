"""An engine of its own for Qwen2 whose block holds the MLP's linear layers itself: no module stands for the MLP."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoConfig

import paritykit as pk

RENAMED = (
    ("model.embed_tokens", "embed"), ("model.layers", "blocks"), ("model.norm", "norm"), ("lm_head", "head"),
    ("input_layernorm", "n1"), ("post_attention_layernorm", "n2"), ("self_attn.", "attn."), ("mlp.", ""),
)  # fmt: skip


class Norm(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.size = config.hidden_size // config.num_attention_heads
        self.base = config.rope_parameters["rope_theta"]
        wide, narrow = config.hidden_size, config.num_key_value_heads * self.size
        self.q_proj, self.o_proj = nn.Linear(wide, wide), nn.Linear(wide, wide, bias=False)
        self.k_proj, self.v_proj = nn.Linear(wide, narrow), nn.Linear(wide, narrow)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        made = (p(x).unflatten(-1, (-1, self.size)).transpose(-3, -2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = made
        mixed = scaled_dot_product_attention(
            self._turn(q, positions), self._turn(k, positions), v, is_causal=True, enable_gqa=True
        )
        out: torch.Tensor = self.o_proj(mixed.transpose(-3, -2).flatten(-2))
        return out

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.size // 2
        angle = positions[0, :, None] * self.base ** (-torch.arange(half) / half)
        u, v = x[..., :half], x[..., half:]
        return torch.cat((u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin()), -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n1, self.n2, self.attn = Norm(config), Norm(config), Attention(config)
        wide, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(wide, inner, bias=False), nn.Linear(wide, inner, bias=False)
        self.down_proj = nn.Linear(inner, wide, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.n1(x), positions)
        y = self.n2(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


class Flat(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm, self.head = Norm(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, positions)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def load(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    own = dict(model.named_parameters())
    for given, tensor in weights:
        name = given
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        own[name].copy_(tensor)


def engine(folder: Path, *, wrong: str = "") -> Any:
    """The engine; ``wrong`` is a parameter that is five per cent too large once it is loaded."""

    def loaded(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        load(model, weights)

    def forward(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(ids, positions)
        return out

    model = Flat(AutoConfig.from_pretrained(folder))
    if wrong:
        module = model.get_submodule(wrong)
        module.register_forward_hook(lambda _, args, output: output * 1.05)
    return pk.engine("module", model=model, forward=forward, load_weights=loaded, checkpoint=folder, dtype="float32")
