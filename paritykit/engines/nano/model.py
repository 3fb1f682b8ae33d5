"""The Llama lineage: one model, driven by its config. Module names are Hugging Face's, fused ones vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import ClassVar

import torch
from torch import nn

from paritykit.engines.nano.attention import Attention, Backend, Scores, gather_attention
from paritykit.engines.nano.config import LayerConfig, NanoConfig
from paritykit.engines.nano.embedding import ParallelHead, VocabParallelEmbedding
from paritykit.engines.nano.layers import MLP, RMSNorm, softcap
from paritykit.engines.nano.linear import QKVParallelLinear, RowParallelLinear
from paritykit.engines.nano.moe import SparseMLP
from paritykit.engines.nano.parameter import Build, Shard
from paritykit.engines.nano.rotary import Rotary
from paritykit.engines.nano.step import Step
from paritykit.engines.nano.weights import load_weights


class SelfAttention(nn.Module):
    """Projections, norms of queries and keys where there are any, rotation, the core, the output projection."""

    def __init__(
        self, config: NanoConfig, layer: LayerConfig, *, rotary: Rotary, backend: Backend, build: Build
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, config.head_dim, config.heads, config.kv_heads, bias=config.qkv_bias, build=build
        )
        self.q_norm = self.k_norm = None
        if config.architecture.qk_norm:
            self.q_norm, self.k_norm = _norm(config, build, config.head_dim), _norm(config, build, config.head_dim)
        self.rotary_emb = rotary
        self.attn = Attention(Scores(config.scale, layer.window, config.attention_softcap), backend)
        width = config.heads * config.head_dim
        self.o_proj = RowParallelLinear(width, config.hidden_size, bias=config.output_bias, build=build)

    def forward(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        query, key, value = self.project(hidden)
        query, key = self.rotary_emb(query, key, step)
        output: torch.Tensor = self.o_proj(self.attn(query, key, value, step))
        return output

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, ``[tokens, heads, head_dim]`` each, of this rank's heads."""
        heads = self.qkv_proj(hidden).view(len(hidden), -1, self.head_dim)
        query, key, value = heads.split([w // self.head_dim for w in self.qkv_proj.widths], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before (and in Gemma after) and added to the residual stream."""

    def __init__(
        self, config: NanoConfig, layer: LayerConfig, *, rotary: Rotary, backend: Backend, build: Build
    ) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, build)
        self.self_attn = SelfAttention(config, layer, rotary=rotary, backend=backend, build=build)
        self.post_attention_layernorm = _norm(config, build)
        self.sandwich = config.architecture.sandwich
        if self.sandwich:
            self.pre_feedforward_layernorm = _norm(config, build)
            self.post_feedforward_layernorm = _norm(config, build)
        self.mlp = (SparseMLP if layer.sparse else MLP)(config, build)

    def forward(self, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """``[tokens, hidden]`` to the same."""
        attended = self.self_attn(self.input_layernorm(hidden), step)
        if not self.sandwich:
            hidden = self.add(hidden, attended)
            return self.add(hidden, self.mlp(self.post_attention_layernorm(hidden)))
        hidden = self.add(hidden, self.post_attention_layernorm(attended))
        return self.add(hidden, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden))))

    def add(self, residual: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """The residual stream after a block."""
        return residual + update


class Layers(nn.Module):
    """The layers of a stage, each under its number in the whole model of ``total`` layers."""

    def __init__(self, layers: Mapping[int, DecoderLayer], *, total: int) -> None:
        super().__init__()
        self.total = total
        for number, layer in layers.items():
            self.add_module(str(number), layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[DecoderLayer]:
        return (m for m in self._modules.values() if isinstance(m, DecoderLayer))

    def __getitem__(self, number: int) -> DecoderLayer:
        found = self._modules.get(str(range(self.total)[number]))
        if not isinstance(found, DecoderLayer):
            raise IndexError(f"layer {number} is on another stage; here are {', '.join(self._modules)}")
        return found


class Decoder(nn.Module):
    """Embedding, layers, final norm, as far as they are on this stage.

    The embedding is on the first stage, and where it is also the output head, on the last; the norm is on the last.
    """

    def __init__(self, config: NanoConfig, build: Build, backend: Backend) -> None:
        super().__init__()
        self.stage = build.stage
        self.embed_tokens = self.norm = None
        if self.stage.first or (config.tied and self.stage.last):
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, build=build)
        self.scale = config.hidden_size**0.5 if config.architecture.embedding_scaled else None
        own = {n: config.layers[n] for n in self.stage.layers(len(config.layers))}
        ropes = {layer.rope: Rotary(layer.rope) for layer in own.values()}
        layers = {
            n: DecoderLayer(config, layer, rotary=ropes[layer.rope], backend=backend, build=build)
            for n, layer in own.items()
        }
        self.layers = Layers(layers, total=len(config.layers))
        if self.stage.last:
            self.norm = _norm(config, build)

    def forward(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The step's tokens, or on a later stage what the one before made of them, to ``[tokens, hidden]``."""
        hidden = self.embed(step.ids) if hidden is None else hidden
        for layer in self.layers:
            hidden = layer(hidden, step)
        return hidden if self.norm is None else self.norm(hidden)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]``; the factor is rounded to the model's dtype, as Gemma was trained."""
        assert self.embed_tokens is not None, "the embedding is on the first stage"
        found: torch.Tensor = self.embed_tokens(ids)
        return found if self.scale is None else found * torch.tensor(self.scale, dtype=found.dtype, device=found.device)


class CausalLM(nn.Module):
    """The model as far as one rank has it.

    ``forward`` gives hidden states; on the last stage ``compute_logits`` makes logits of some of them.
    """

    packed_modules_mapping: ClassVar[Mapping[str, Mapping[Shard, str]]] = {
        "qkv_proj": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
        "gate_up_proj": {0: "gate_proj", 1: "up_proj"},
    }
    """Fused module to the checkpoint's names of its shards."""

    def __init__(self, config: NanoConfig, build: Build, *, backend: Backend = gather_attention) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, build, backend)
        self.lm_head = None
        if build.stage.last:
            self.lm_head = ParallelHead(config.vocab_size, config.hidden_size, build=build)
            if config.tied and self.model.embed_tokens is not None:
                self.lm_head.tie(self.model.embed_tokens)
        own = {n for n, _ in self.named_modules()}
        numbered = (f"model.layers.{n}" for n in range(len(config.layers)))
        self._elsewhere = {"model.embed_tokens", "model.norm", "lm_head", *numbered} - own

    def forward(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """``[tokens, hidden]``: after the final norm, or as the next stage is to get it."""
        found: torch.Tensor = self.model(step, hidden)
        return found

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[tokens, hidden]`` to ``[tokens, vocabulary]``."""
        assert self.lm_head is not None, "the output head is on the last stage"
        return softcap(self.lm_head(hidden), self.config.final_softcap)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load (name, tensor) pairs by checkpoint name. Returns the names of the parameters that got any.

        Tensors of other stages are skipped. Raises EngineError for an unknown name or a wrong shape; what is missing
        is the caller's to check.
        """
        return load_weights(self, weights)

    def elsewhere(self, tensor: str) -> bool:
        """Whether a checkpoint tensor is for a module of another stage, which loads it or refuses it."""
        return any(path in self._elsewhere for path in accumulate(tensor.split(".")[:3], "{}.{}".format))

    def attentions(self) -> list[tuple[str, SelfAttention]]:
        """Path and module of every attention, in order of layers."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, SelfAttention)]


def _norm(config: NanoConfig, build: Build, size: int | None = None) -> RMSNorm:
    return RMSNorm(size or config.hidden_size, eps=config.eps, offset=config.architecture.norm_offset, build=build)
