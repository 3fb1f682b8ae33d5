"""Which causal language models transformers has, and which of them vLLM takes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from paritykit.errors import EngineMissingError, UnknownNameError

BACKEND = "TransformersForCausalLM"
"""vLLM's class for models that it has none for; for some it takes a subclass."""


def class_names() -> dict[str, str]:
    """By ``model_type``: the class of the causal language model that transformers makes from its config, all of them.

    Raises EngineMissingError without transformers.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
    except ImportError as error:
        raise EngineMissingError("drawn models need transformers: pip install 'paritykit[hf]'") from error
    return {kind: name if isinstance(name, str) else name[0] for kind, name in sorted(NAMES.items())}


@cache
def causal_classes() -> dict[str, str]:
    """Those of ``class_names`` into which nothing but text goes, and before which no encoder stands.

    Of several model types that share a config class, its own one. Imports the config class of each.
    """
    return {kind: name for kind, name in class_names().items() if is_plain(kind)}


def find_class(model_type: str) -> Any:
    """The class of a ``model_type``. Raises UnknownNameError with the nearest names."""
    import transformers

    if model_type not in class_names():
        raise UnknownNameError("model type of a causal language model", model_type, class_names())
    return getattr(transformers, class_names()[model_type])


def config_class(model_type: str) -> Any:
    """The config class of a ``model_type``."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


@cache
def vllm_classes() -> dict[str, str]:
    """Those of ``causal_classes`` that vLLM takes: by ``model_type``, the name of the class that it runs them with.

    That is a class of its own, or its Transformers backend's where it has none and the model lets its attention be
    replaced. Imports vLLM; raises EngineMissingError without it.
    """
    try:
        from vllm.model_executor.models import registry
    except ImportError as error:
        raise EngineMissingError("which models vLLM takes is asked of vLLM, which is not installed") from error
    text = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    known = set(registry.ModelRegistry.get_supported_archs())
    found = {}
    for kind, name in causal_classes().items():
        if name in text:
            found[kind] = str(text[name][1])
        elif name not in known and find_class(kind).is_backend_compatible():
            found[kind] = BACKEND
    return found


def sample(names: Sequence[str], size: int, *, seed: int) -> list[str]:
    """So many of ``names``, drawn by ``seed``: the same on every machine, whatever else is in the list.

    >>> sample(["a", "b", "c"], 2, seed=1) == sample(["c", "b", "a"], 2, seed=1)
    True
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())[:size]


def is_plain(model_type: str) -> bool:
    """Whether it has a config class of its own, with no part that sees, hears or encodes, and none for the text."""
    kind = config_class(model_type)
    senses = ("text", "vision", "audio", "image", "encoder", "decoder")
    parts = [n for n in getattr(kind, "sub_configs", {}) if any(word in n for word in senses)]
    return getattr(kind, "model_type", "") == model_type and not parts and not _has_encoder(kind)


def _has_encoder(kind: Any) -> bool:
    return next((f.default for f in dataclasses.fields(kind) if f.name == "is_encoder_decoder"), False) is True
