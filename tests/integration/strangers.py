"""Tiny checkpoints of architectures that no line of ParityKit knows, DeepSeek's latent attention among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SMALL = {"vocab_size": 499, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None}
_LLAMA = {
    **_SMALL,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
_LATENT = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "aux_loss_alpha": 0.0},
    "deepseek_v3": {**_LATENT, "norm_topk_prob": True},
    "gpt_neox": {
        **_SMALL,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "rotary_pct": 0.5,
    },
    "stablelm": {**_LLAMA, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "olmo2": {**_LLAMA, "pad_token_id": None},
    "granite": {**_LLAMA, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "starcoder2": {**_LLAMA, "use_bias": True, "sliding_window": None},
    "phi": {**_LLAMA, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "bloom": {"vocab_size": 499, "hidden_size": 128, "n_layer": 3, "n_head": 4},
    "cohere": {**_LLAMA, "tie_word_embeddings": True, "logit_scale": 0.25, "pad_token_id": None},
    "cohere2": {**_LLAMA, "tie_word_embeddings": True, "logit_scale": 0.25, "pad_token_id": None},
    "ernie4_5": _LLAMA,
    "granitemoe": {
        **_LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "falcon": {
        **_SMALL,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "bias": False,
    },
    "qwen2_moe": {
        **_LLAMA,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
}
EXTRA = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
"""Keys that transformers' config class lacks and vLLM asks for."""


def make(kind: str, folder: Path, **extra: Any) -> Path:
    """A seeded float32 checkpoint, no weight at the value it would have by default; ``extra`` goes into its config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(0, 0.1)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | EXTRA.get(kind, {}) | extra))
    return folder
