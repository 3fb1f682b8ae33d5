"""Config keys that change what is computed, and that config.json may leave to a default. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice

NUMERIC = {
    "shape": (
        "head_dim",
        "num_key_value_heads",
        "num_attention_heads",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    ),
    "depth": ("num_hidden_layers",),
    "norm": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "position": ("rope_theta", "rope_parameters", "partial_rotary_factor", "max_position_embeddings"),
    "attention": ("sliding_window", "layer_types", "attention_bias", "query_pre_attn_scalar", "attn_logit_softcapping"),
    "head": ("tie_word_embeddings", "final_logit_softcapping"),
    "experts": ("num_experts_per_tok", "norm_topk_prob", "num_experts", "num_local_experts", "moe_intermediate_size"),
}
"""By kind of quantity, so that a new model's own name for one is added in its place."""
ROPE = {"rope_theta", "rope_parameters", "rope_scaling", "rope_local_base_freq"}
SHAPES = {*NUMERIC["shape"], "num_experts", "num_local_experts", "moe_intermediate_size"}


def filled(folder: Folder) -> list[str]:
    """Keys that set shapes, absent from config.json, as far as the config class has them."""
    return [k for k in _absent(folder) if k in SHAPES]


def by_default(folder: Folder) -> Iterator[Notice]:
    """Keys that matter for the numbers and were filled in silently."""
    for key, value in _absent(folder).items():
        yield Notice(
            code="config-default-filled",
            severity="note",
            place=key,
            message=f"config.json does not give {key}; {folder.model.config_class} fills in {_short(value)}",
            hf=f"uses {_short(value)}; another version may have another default",
            vllm="asks the same config class, unless it has one of its own for this model_type",
            fix=f"write {key} into config.json",
        )


def _absent(folder: Folder) -> dict[str, Any]:
    model = folder.model
    inner = folder.config.get("text_config")
    given = set(folder.config) | set(inner if isinstance(inner, dict) else ())
    given |= {k for k, v in model.aliases.items() if v in given} | {v for k, v in model.aliases.items() if k in given}
    if given & ROPE:
        given |= ROPE
    wanted = [k for kind in NUMERIC.values() for k in kind]
    known = set(model.known)
    return {k: v for k in wanted if k in known and k not in given and (v := model.config.get(k)) is not None}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


RULES = (by_default,)
