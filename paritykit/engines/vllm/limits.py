"""Sizes vLLM must be told, and sizes it cannot have. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import UsageError

LENGTH = 4096
KV_MINIMUM = 64 << 20
SEQUENCES = 2


def default_lengths(checkpoint: Checkpoint) -> int:
    """``max_model_len`` where none is given: the model's own, but not more than 4096 positions."""
    return min(checkpoint.max_positions or LENGTH, LENGTH)


def binding(ranks: int, cores: Sequence[int]) -> str:
    """``VLLM_CPU_OMP_THREADS_BIND`` where none is set: a core for each rank, no binding where cores are too few.

    >>> binding(2, [4, 5, 6]), binding(3, [0, 1])
    ('4|5', 'nobind')
    """
    return "|".join(map(str, cores[:ranks])) if len(cores) >= ranks else "nobind"


def kv_cache_bytes(checkpoint: Checkpoint, length: int) -> int:
    """KV cache in bytes for a few full-length requests in float32, 64 MiB at least."""
    config = checkpoint.text_config
    layers = _number(config, "num_hidden_layers", "n_layer", default=1)
    heads = _number(config, "num_attention_heads", "n_head", default=1)
    kv_heads = _number(config, "num_key_value_heads", default=heads)
    head_dim = _number(config, "head_dim", default=_number(config, "hidden_size", "n_embd", default=heads) // heads)
    latent = _number(config, "kv_lora_rank", default=0) + _number(config, "qk_rope_head_dim", default=0)
    row = max(2 * kv_heads * head_dim, latent) * 4
    return max(KV_MINIMUM, SEQUENCES * length * layers * row)


def check_parallel(checkpoint: Checkpoint, size: int) -> None:
    """Raise UsageError if ``tensor_parallel_size`` does not divide what must be divided."""
    if size < 1:
        raise UsageError(f"tensor_parallel_size must be at least 1, not {size}")
    config = checkpoint.text_config
    heads = _number(config, "num_attention_heads", "n_head", default=size)
    kv_heads = _number(config, "num_key_value_heads", default=heads)
    if heads % size:
        raise UsageError(f"tensor_parallel_size {size} does not divide the model's {heads} attention heads")
    if kv_heads % size and size % kv_heads:
        raise UsageError(f"tensor_parallel_size {size} neither divides nor is a multiple of the {kv_heads} kv heads")
    for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim"):
        width = config.get(name)
        if isinstance(width, int) and width % size:
            raise UsageError(f"tensor_parallel_size {size} does not divide {name} {width}")


def _number(config: dict[str, Any], *names: str, default: int) -> int:
    return next((v for n in names if isinstance(v := config.get(n), int) and v > 0), default)
