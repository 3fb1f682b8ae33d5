"""The models that faults are planted in, and those of clean pairs: tiny ones, trained ones, drawn ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import UnknownNameError
from paritykit.testing.drawn.catalogue import sample, vllm_classes
from paritykit.testing.drawn.named import DRAWN
from paritykit.testing.families import tiny_config
from paritykit.testing.faults.table import Fault
from paritykit.testing.names import folder_of
from paritykit.testing.real import SHORTENED, config_named

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


TRAINED = tuple(SHORTENED.values())
"""Trained weights, by the names that ``paritykit run`` takes."""
ARCHITECTURES = 50
"""Architectures that clean pairs are drawn of."""


def architectures() -> list[str]:
    """The drawn models of clean pairs, by the names that ``paritykit run`` takes. Raises EngineMissingError."""
    return [f"{DRAWN}{name}" for name in sample(list(vllm_classes()), ARCHITECTURES, seed=0)]


def config_of(name: str) -> dict[str, Any]:
    """The config of the model of that name."""
    if name in TRAINED:
        return config_named(name)
    if name not in MODELS:
        return dict(Checkpoint.find(str(model_of(name))).config)
    family, overrides = MODELS[name]
    return tiny_config(family, num_hidden_layers=LAYERS, **overrides)


@cache
def model_of(name: str) -> Path:
    """The folder of the model of that name, built where it is not there yet."""
    if name not in MODELS:
        return Path(folder_of(name))
    from paritykit.testing.tiny import tiny_model

    family, overrides = MODELS[name]
    return tiny_model(family, num_hidden_layers=LAYERS, **overrides)


def vocabulary_of(name: str) -> int:
    """Token ids that cases of this model may have: as few as the tiny models have, so that all run the same ones."""
    return VOCABULARY if name in MODELS else min(VOCABULARY, Checkpoint.find(str(model_of(name))).vocab_size)


def runs_in_nano(name: str) -> bool:
    """Whether the embedded engine has the model's family."""
    from paritykit.engines.nano.config import NanoConfig

    try:
        NanoConfig.read(config_of(name))
    except UnknownNameError:
        return False
    return True


def homes(fault: Fault, names: Iterable[str] = MODELS) -> dict[str, int]:
    """Those of the models that the fault fits, each with the layer to plant it in: the second, where that can be."""
    found = {}
    for name in names:
        layers = fault.layers(config_of(name))
        if layers:
            found[name] = min(layers, key=lambda n: abs(n - 1))
    return found


def layer_of(fault: Fault, name: str) -> int:
    """The layer that a fault is planted in."""
    return homes(fault, [name])[name]
