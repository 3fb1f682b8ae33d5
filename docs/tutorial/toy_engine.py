"""A complete engine for Qwen2 in plain torch: fused projections, names of its own, a loader of its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

import paritykit as pk


def rotate(x, positions, theta):
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        self.size, self.theta = c.hidden_size // c.num_attention_heads, c.rope_parameters.rope_theta
        self.qkv_proj = nn.Linear(c.hidden_size, sum(self.heads) * self.size)
        self.out = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x, positions):
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.size)).split(self.heads, dim=-2)
        q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps), Attention(c)
        self.norm2, self.ffn = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps), FeedForward(c)

    def forward(self, x, positions):
        x = x + self.attn(self.norm1(x), positions)
        return x + self.ffn(self.norm2(x))


class Toy(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.last_norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.unembed = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, ids, positions):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, positions)
        return self.unembed(self.last_norm(x))


RENAMED = {
    "model.embed_tokens": "tokens", "model.layers": "blocks", "model.norm": "last_norm", "lm_head": "unembed",
    "input_layernorm": "norm1", "post_attention_layernorm": "norm2",
    "self_attn": "attn", "o_proj": "out", "mlp": "ffn", "down_proj": "down",
}  # fmt: skip
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def load_weights(model, weights):
    found = {}
    for name, tensor in weights:
        own = name
        for theirs, ours in RENAMED.items():
            own = own.replace(theirs, ours)
        found[own] = tensor
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        parts = [found[name.replace(module, part)] for part in FUSED.get(module, [module])]
        parameter.copy_(torch.cat(parts))


def make(folder, dtype):
    config = Path(folder, "config.json").read_text()
    toy = Toy(json.loads(config, object_hook=lambda fields: SimpleNamespace(**fields)))
    return pk.engine(
        "module", model=toy, forward=Toy.forward, load_weights=load_weights, checkpoint=folder, name="toy", dtype=dtype
    )
