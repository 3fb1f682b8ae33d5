"""The architectures that nano knows, as data: what each has that a plain Llama has not. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paritykit.errors import UnknownNameError

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint calls the parts of a sparse layer: the block, and gate, down and up of each expert."""

    block: str
    gate: str
    down: str
    up: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    ``windows`` says which layers have a sliding window where the config names no ``layer_types``: ``none``, ``all``,
    ``switched`` (all, if ``use_sliding_window``), ``upper`` (of those, from ``max_window_layers`` on) or ``pattern``
    (all but every n-th). ``softcaps`` are the fields that hold tanh caps. ``norm_offset`` is added to norm weights;
    ``sandwich`` norms also follow attention and MLP. ``defaults`` are fields that the config class has when
    ``config.json`` leaves them out.
    """

    name: str
    model_type: str
    windows: str = "none"
    pattern: int = 2
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich: bool = False
    embedding_scaled: bool = False
    softcaps: tuple[str, ...] = ()
    theta: float = 10000.0
    local_theta: float | None = None
    experts: ExpertNames | None = None
    renormalise: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def layer_type(self, layer: int, config: Mapping[str, Any]) -> str:
        """``sliding_attention`` or ``full_attention``, where the config does not say."""
        windowed = config.get("sliding_window") is not None
        if self.windows in ("upper", "switched"):
            windowed &= bool(config.get("use_sliding_window"))
        if self.windows == "upper":
            windowed &= layer >= config.get("max_window_layers", 28)
        elif self.windows == "pattern":
            windowed &= bool((layer + 1) % config.get("sliding_window_pattern", self.pattern))
        return "sliding_attention" if windowed and self.windows != "none" else "full_attention"


_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_KNOWN = (
    Architecture(name="LlamaForCausalLM", model_type="llama"),
    Architecture(name="MistralForCausalLM", model_type="mistral", windows="all", defaults={"sliding_window": 4096}),
    Architecture(name="Qwen2ForCausalLM", model_type="qwen2", windows="upper", qkv_bias=True),
    Architecture(
        name="Qwen3ForCausalLM", model_type="qwen3", windows="upper", qk_norm=True, defaults={"head_dim": 128}
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        windows="pattern",
        norm_offset=1.0,
        sandwich=True,
        embedding_scaled=True,
        softcaps=("attn_logit_softcapping", "final_logit_softcapping"),
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    Architecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        windows="pattern",
        pattern=6,
        qk_norm=True,
        norm_offset=1.0,
        sandwich=True,
        embedding_scaled=True,
        softcaps=("final_logit_softcapping",),
        theta=1e6,
        local_theta=1e4,
        defaults=_GEMMA,
    ),
    Architecture(
        name="MixtralForCausalLM",
        model_type="mixtral",
        windows="all",
        theta=1e6,
        experts=ExpertNames("block_sparse_moe", "w1", "w2", "w3"),
        renormalise=True,
        defaults={"rms_norm_eps": 1e-5},
    ),
    Architecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        windows="switched",
        qk_norm=True,
        experts=ExpertNames("mlp", "gate_proj", "down_proj", "up_proj"),
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {a.name: a for a in _KNOWN}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that ``config`` names, or that of its ``model_type``. Raises UnknownNameError."""
    named = config.get("architectures") or []
    if named:
        found = next((ARCHITECTURES[n] for n in named if n in ARCHITECTURES), None)
    else:
        found = next((a for a in _KNOWN if a.model_type == config.get("model_type")), None)
    if found is None:
        name = str(named[0] if named else config.get("model_type"))
        raise UnknownNameError("architecture for engine 'nano':", name, ARCHITECTURES)
    return found
