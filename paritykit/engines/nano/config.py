"""A model as nano builds it, read from a Hugging Face ``config.json``. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.architectures import ACTIVATIONS, Architecture, ExpertNames, find_architecture
from paritykit.engines.nano.rope import Rope, read_ropes
from paritykit.errors import UnknownNameError, UsageError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: how many, how many of them a token gets, and their width."""

    count: int
    chosen: int
    width: int
    renormalise: bool
    names: ExpertNames


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What differs between layers: the attention window (None: all of the past), the rope, dense or sparse."""

    window: int | None
    rope: Rope
    sparse: bool


@dataclass(frozen=True, kw_only=True)
class NanoConfig:
    """Everything about a model but its weights. ``NanoConfig.read(config)`` makes one."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    eps: float
    activation: str
    scale: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    attention_softcap: float | None
    final_softcap: float | None
    experts: Experts | None
    max_positions: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> NanoConfig:
        """The model described by ``config``. Raises UsageError for what nano does not know or cannot be."""
        kind = find_architecture(config)
        if config.get("quantization_config"):
            raise UsageError("nano reads plain weights only, and this config.json has a quantization_config")
        fields = _Fields({**kind.defaults, **config})
        heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
        head_dim = fields.count("head_dim", hidden // heads)
        bias = bool(fields.get("attention_bias"))
        return cls(
            architecture=kind,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            heads=heads,
            kv_heads=_kv_heads(fields, heads),
            head_dim=head_dim,
            layers=_layers(kind, fields, head_dim),
            eps=float(fields.get("rms_norm_eps", 1e-6)),
            activation=_activation(fields),
            scale=float(fields.get("query_pre_attn_scalar", head_dim)) ** -0.5,
            qkv_bias=kind.qkv_bias or bias,
            output_bias=bias,
            mlp_bias=bool(fields.get("mlp_bias")),
            tied=bool(fields.get("tie_word_embeddings")),
            attention_softcap=fields.softcap(kind, "attn_logit_softcapping"),
            final_softcap=fields.softcap(kind, "final_logit_softcapping"),
            experts=_experts(kind, fields),
            max_positions=fields.count("max_position_embeddings"),
        )

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> NanoConfig:
        """The model in ``checkpoint``: its language model's config, but the architecture that the whole names."""
        return cls.read({**checkpoint.text_config, "architectures": checkpoint.config.get("architectures")})

    def check_parallel(self, size: int, *, stages: int = 1) -> None:
        """Raise UsageError if ``size`` ranks cannot share this model evenly, or there is no layer for each stage."""
        if stages > len(self.layers):
            raise UsageError(
                f"pipeline_parallel_size {stages} is more than the model's {len(self.layers)} layers: "
                "every stage needs at least one"
            )
        if size < 1:
            raise UsageError(f"tensor_parallel_size must be at least 1, not {size}")
        if self.heads % size:
            raise UsageError(f"tensor_parallel_size {size} does not divide the model's {self.heads} attention heads")
        if self.kv_heads % size and size % self.kv_heads:
            raise UsageError(
                f"tensor_parallel_size {size} neither divides nor is a multiple of the {self.kv_heads} kv heads"
            )
        widths = {self.intermediate_size} if any(not layer.sparse for layer in self.layers) else set()
        for width in sorted(widths | ({self.experts.width} if self.experts else set())):
            if width % size:
                raise UsageError(f"tensor_parallel_size {size} does not divide the intermediate size {width}")


class _Fields:
    """Fields of a config with the architecture's defaults under them, checked as they are read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def softcap(self, kind: Architecture, name: str) -> float | None:
        value = self.values.get(name) if name in kind.softcaps else None
        return None if value is None else float(value)

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"config.json: {name} must be a positive integer, not {value!r}")
        return value


def _kv_heads(fields: _Fields, heads: int) -> int:
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UsageError(f"config.json: {heads} attention heads cannot share {kv_heads} kv heads evenly")
    return kv_heads


def _activation(fields: _Fields) -> str:
    name = str(fields.get("hidden_activation") or fields.get("hidden_act") or "silu")
    if name not in ACTIVATIONS:
        raise UnknownNameError("activation", name, ACTIVATIONS)
    return name


def _layers(kind: Architecture, fields: _Fields, head_dim: int) -> tuple[LayerConfig, ...]:
    count = fields.count("num_hidden_layers")
    types = fields.get("layer_types") or [kind.layer_type(n, fields.values) for n in range(count)]
    unknown = [t for t in types if t not in (FULL, SLIDING)]
    if unknown or len(types) != count:
        raise UsageError(f"config.json: layer_types must name {FULL} or {SLIDING} for each of {count} layers")
    ropes = read_ropes(fields.values, head_dim=head_dim, theta=kind.theta, local_theta=kind.local_theta)
    window = fields.count("sliding_window") if SLIDING in types else None
    dense = fields.get("mlp_only_layers") or ()
    step = fields.get("decoder_sparse_step", 1)
    return tuple(
        LayerConfig(
            window=window if types[n] == SLIDING else None,
            rope=ropes[types[n]],
            sparse=kind.experts is not None and n not in dense and (n + 1) % step == 0,
        )
        for n in range(count)
    )


def _experts(kind: Architecture, fields: _Fields) -> Experts | None:
    if kind.experts is None:
        return None
    count = fields.count("num_experts", fields.get("num_local_experts"))
    chosen = fields.count("num_experts_per_tok")
    if chosen > count:
        raise UsageError(f"config.json: num_experts_per_tok {chosen} is more than the {count} experts")
    return Experts(
        count=count,
        chosen=chosen,
        width=fields.count("moe_intermediate_size", fields.get("intermediate_size")),
        renormalise=kind.renormalise or bool(fields.get("norm_topk_prob")),
        names=kind.experts,
    )
