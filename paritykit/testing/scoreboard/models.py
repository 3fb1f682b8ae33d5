"""The tiny models that faults are planted in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paritykit.testing.families import tiny_config
from paritykit.testing.faults.table import Fault

LAYERS, VOCABULARY = 3, 499
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "llama_tied": ("llama_tied", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
}
"""By name: the family, and what of its config is changed, so that together they have all that a fault may need."""


def config_of(name: str) -> dict[str, Any]:
    """The config of the model of that name."""
    family, overrides = MODELS[name]
    return tiny_config(family, num_hidden_layers=LAYERS, **overrides)


def model_of(name: str) -> Path:
    """The folder of the model of that name, built where it is not there yet."""
    from paritykit.testing.tiny import tiny_model

    family, overrides = MODELS[name]
    return tiny_model(family, num_hidden_layers=LAYERS, **overrides)


def homes(fault: Fault, names: Iterable[str] = MODELS) -> dict[str, int]:
    """Those of the models that the fault fits, each with the layer to plant it in: the second, where that can be."""
    found = {}
    for name in names:
        layers = fault.layers(config_of(name))
        if layers:
            found[name] = min(layers, key=lambda n: abs(n - 1))
    return found
