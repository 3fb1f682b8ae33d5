"""Which causal language models transformers has, and which of them vLLM takes."""

from __future__ import annotations

from functools import cache
from typing import Any

from paritykit.errors import EngineMissingError, UnknownNameError

BACKEND = "TransformersForCausalLM"
"""vLLM's class for models that it has none for; for some it takes a subclass."""


@cache
def causal_classes() -> dict[str, str]:
    """By ``model_type``: the class of the causal language model that transformers makes from its config.

    Of several that give one class, that one whose config the class names as its own; those that have an encoder, or
    see pictures or hear, are left out. Raises EngineMissingError without transformers.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
    except ImportError as error:
        raise EngineMissingError("drawn models need transformers: pip install 'paritykit[hf]'") from error
    names = {kind: name if isinstance(name, str) else name[0] for kind, name in NAMES.items()}
    return {kind: name for kind, name in sorted(names.items()) if _is_own(kind, name) and _is_plain(kind)}


def find_class(model_type: str) -> Any:
    """The class of a ``model_type``. Raises UnknownNameError with the nearest names."""
    import transformers

    if model_type not in causal_classes():
        raise UnknownNameError("model type of a causal language model", model_type, causal_classes())
    return getattr(transformers, causal_classes()[model_type])


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


def _is_own(model_type: str, name: str) -> bool:
    import transformers

    found, config = getattr(transformers, name, None), config_class(model_type)
    return getattr(found, "config_class", None) is config and getattr(config, "model_type", "") == model_type


def _is_plain(model_type: str) -> bool:
    """Whether nothing but text goes in, and no encoder stands before."""
    kind = config_class(model_type)
    parts = {name for name in getattr(kind, "sub_configs", {}) if "text" not in name}
    senses = {n for n in parts if any(word in n for word in ("vision", "audio", "image", "encoder", "decoder"))}
    return not senses and not getattr(kind, "is_composition", False) and not _has_encoder(kind)


def _has_encoder(kind: Any) -> bool:
    import dataclasses

    default = next((f.default for f in dataclasses.fields(kind) if f.name == "is_encoder_decoder"), False)
    return default is True
