"""Mistakes planted in a loaded vLLM model, on every worker: ``after_load="tests.integration.planted:rope_theta"``."""

from __future__ import annotations

import copy
from typing import Any

import torch


def layer_of(worker: Any, layer: int) -> Any:
    return worker.model_runner.model.model.layers[layer]


def nothing(worker: Any, *, layer: int) -> None:
    norm = layer_of(worker, layer).input_layernorm
    norm.variance_epsilon = float(norm.variance_epsilon)


def rope_theta(worker: Any, *, layer: int) -> None:
    """One layer rotates with another base; the rotary module is shared, so that layer gets a copy."""
    attention = layer_of(worker, layer).self_attn
    rotary = copy.deepcopy(attention.rotary_emb)
    rotary.base = rotary.base * 2
    rotary.cos_sin_cache = rotary._compute_cos_sin_cache().to(rotary.cos_sin_cache.dtype)
    attention.rotary_emb = rotary


def norm_eps(worker: Any, *, layer: int) -> None:
    """The hard-coded default in place of the config's own (1e-3 in the tiny models)."""
    norm = layer_of(worker, layer).input_layernorm
    assert norm.variance_epsilon == 1e-3
    norm.variance_epsilon = 1e-6


def gate_up_swapped(worker: Any, *, layer: int) -> None:
    linear = layer_of(worker, layer).mlp.gate_up_proj
    forward = linear.forward

    def swapped(x: torch.Tensor) -> Any:
        output, bias = forward(x)
        return torch.cat(output.chunk(2, dim=-1)[::-1], dim=-1), bias

    linear.forward = swapped


def v_bias_dropped(worker: Any, *, layer: int) -> None:
    qkv = layer_of(worker, layer).self_attn.qkv_proj
    qkv.bias.data[-(qkv.output_sizes[2] // qkv.tp_size) :] = 0


def attention_scale(worker: Any, *, layer: int) -> None:
    layer_of(worker, layer).self_attn.attn.impl.scale *= 1.1


def residual_dropped(worker: Any, *, layer: int) -> None:
    """The first residual sum of a layer leaves the residual out; it is fused with the norm that follows."""
    block = layer_of(worker, layer)
    norm = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
    norm.register_forward_pre_hook(lambda _, args: (args[0], torch.zeros_like(args[1])))


def lm_head_permuted(worker: Any, *, layer: int) -> None:
    processor = worker.model_runner.model.logits_processor
    head = processor._apply_head
    processor._apply_head = lambda *args: head(*args).roll(1, dims=-1)
