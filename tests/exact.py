"""A decoder of the Llama lineage in plain float64, from a checkpoint's config and tensors alone: what truth is held to.

Nothing of transformers is used. Rows are the tokens of one case, ``[tokens, features]``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from paritykit.testing.families import find_family

Tensor = torch.Tensor
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def default_frequencies(config: dict[str, Any]) -> Tensor:
    """Angles by position: ``theta ** (-2 i / head_dim)``."""
    dim = head_dim(config)
    theta = config["rope_parameters"]["rope_theta"]
    return torch.tensor([theta ** (-i / dim) for i in range(0, dim, 2)], dtype=torch.float64)


def head_dim(config: dict[str, Any]) -> int:
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


class Exact:
    """Computes the points of ``folder``'s model for some tokens, by the names that a capture gives them."""

    def __init__(self, folder: Path, family: str, *, frequencies: Tensor | None = None, scale: float = 1.0) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {k: v.double() for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        self.gemma = find_family(family).embedding_scaled
        self.frequencies = default_frequencies(self.config) if frequencies is None else frequencies
        self.scale = scale
        self.points: dict[str, Tensor] = {}

    def run(self, tokens: tuple[int, ...]) -> dict[str, Tensor]:
        x = self.weights["model.embed_tokens.weight"][list(tokens)]
        x = self.put("model.embed_tokens", x * self.config["hidden_size"] ** 0.5 if self.gemma else x)
        for layer in range(self.config["num_hidden_layers"]):
            x = self.put(f"model.layers.{layer}", self.layer(x, f"model.layers.{layer}", layer))
        x = self.norm(x, "model.norm")
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        logits = self.put("lm_head", x @ self.weights[f"{head}.weight"].T)
        self.put("#logits", capped(logits, self.config.get("final_logit_softcapping")))
        return self.points

    def layer(self, x: Tensor, path: str, layer: int) -> Tensor:
        attended = self.attention(self.norm(x, f"{path}.input_layernorm"), f"{path}.self_attn", layer)
        if not self.gemma:
            x = x + attended
            return x + self.mlp(self.norm(x, f"{path}.post_attention_layernorm"), f"{path}.mlp")
        x = x + self.norm(attended, f"{path}.post_attention_layernorm")
        done = self.mlp(self.norm(x, f"{path}.pre_feedforward_layernorm"), f"{path}.mlp")
        return x + self.norm(done, f"{path}.post_feedforward_layernorm")

    def norm(self, x: Tensor, path: str) -> Tensor:
        weight = self.weights[f"{path}.weight"] + (1 if self.gemma else 0)
        size = ((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return self.put(path, x / size * weight)

    def linear(self, x: Tensor, path: str) -> Tensor:
        y = x @ self.weights[f"{path}.weight"].T
        return self.put(path, y + self.weights.get(f"{path}.bias", torch.zeros(1).double()))

    def attention(self, x: Tensor, path: str, layer: int) -> Tensor:
        size = head_dim(self.config)
        q, k, v = (self.linear(x, f"{path}.{n}_proj").unflatten(-1, (-1, size)) for n in "qkv")
        q, k = self.rotate(q), self.put(f"{path}#key_cache", self.rotate(k))
        self.put(f"{path}#value_cache", v)
        shared = q.shape[1] // k.shape[1]
        unit = self.config.get("query_pre_attn_scalar") or size
        context = torch.empty_like(q)
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // shared].T / math.sqrt(unit)
            scores = capped(scores, self.config.get("attn_logit_softcapping"))
            weights = scores.exp() * self.seen(len(x), layer)
            context[:, head] = weights / weights.sum(-1, keepdim=True) @ v[:, head // shared]
        return self.put(path, self.linear(context.flatten(1), f"{path}.o_proj"))

    def seen(self, tokens: int, layer: int) -> Tensor:
        """1 where a token, ``[rows]``, may look at another, ``[columns]``; 0 elsewhere."""
        kinds = self.config.get("layer_types") or ["full_attention"] * (layer + 1)
        window = self.config["sliding_window"] if kinds[layer] == "sliding_attention" else tokens
        behind = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        return ((behind >= 0) & (behind < window)).double()

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position embedding, the second half of a head paired with the first."""
        angles = torch.arange(len(x)).double()[:, None] * self.frequencies
        cos, sin = (self.scale * f(angles)[:, None] for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def mlp(self, x: Tensor, path: str) -> Tensor:
        if "num_local_experts" in self.config:
            return self.experts(x, path)
        gate = GATES[self.config.get("hidden_act") or self.config["hidden_activation"]](
            self.linear(x, f"{path}.gate_proj")
        )
        return self.put(path, self.linear(gate * self.linear(x, f"{path}.up_proj"), f"{path}.down_proj"))

    def experts(self, x: Tensor, path: str) -> Tensor:
        """Mixtral's: the best experts by router score, their scores made to sum to 1."""
        own = path.replace("mlp", "block_sparse_moe")
        scores = self.put(f"{path}.gate", x @ self.weights[f"{own}.gate.weight"].T)
        best = scores.sort(descending=True).indices[:, : self.config["num_experts_per_tok"]]
        result = torch.zeros_like(x)
        for row, chosen in enumerate(best.tolist()):
            shares = scores[row, chosen].exp() / scores[row, chosen].exp().sum()
            for expert, share in zip(chosen, shares, strict=True):
                w1, w2, w3 = (self.weights[f"{own}.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
                result[row] += share * (w2 @ (GATES["silu"](w1 @ x[row]) * (w3 @ x[row])))
        return self.put(path, result)

    def put(self, name: str, value: Tensor) -> Tensor:
        self.points[name] = value
        return value


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
