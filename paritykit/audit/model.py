"""What transformers makes of a checkpoint's config, and of its tensors by name and shape, as plain facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from paritykit.audit.header import Tensor
from paritykit.audit.shapes import Mismatch, Shape

UNKNOWN = ("trust_remote_code", "does not recognize", "Unrecognized model")
"""How transformers says that it has no class for a model_type."""


class HFModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model transformers builds, as plain facts.

    ``refused`` says why there is no model, ``unknown`` that only remote code or a newer transformers could build it.
    ``config`` holds the effective values after defaults, ``known`` the names the config class knows. ``norms`` is the
    value that each norm weight has before training, by checkpoint tensor. ``head`` and ``embedding`` are the
    names a checkpoint should have for them, ``stored_*`` the names it has.
    """

    refused: str = ""
    unknown: bool = False
    quantized: bool = False
    class_name: str = ""
    config_class: str = ""
    source: str = ""
    config: dict[str, Any] = {}
    known: list[str] = []
    aliases: dict[str, str] = {}
    text_key_missing: bool = False
    built: bool = False
    tied: bool = False
    head: str = ""
    stored_head: str = ""
    embedding: str = ""
    stored_embedding: str = ""
    expected: dict[str, Shape] = {}
    missing: list[str] = []
    unexpected: list[str] = []
    mismatched: list[Mismatch] = []
    norms: dict[str, float] = {}


def read_model(path: Path, tensors: Mapping[str, Tensor]) -> HFModel:
    """Build the model of ``path`` without weights and let transformers load ``tensors`` into it, by name and shape."""
    from paritykit.audit.loading import load
    from paritykit.engines.hf import quiet

    with quiet():
        try:
            config = _config(path)
        except Exception as error:  # a config class may raise anything
            text = _first_line(error, path)
            unknown = any(said in str(error) for said in UNKNOWN)
            return HFModel(refused=text, unknown=unknown)
        facts = _config_facts(path, config)
        if facts["quantized"]:
            return HFModel(**facts, refused="the checkpoint is quantized")
        try:
            return HFModel(**facts, **load(config, tensors))
        except Exception as error:  # as may a model class
            return HFModel(**facts, refused=_first_line(error, path))


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _config_facts(path: Path, config: Any) -> dict[str, Any]:
    import inspect
    import json

    written = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = type(config)
    own = [n for c in kind.__mro__ for n in (*vars(c).get("__annotations__", {}), *vars(c)) if not n.startswith("_")]
    inner = getattr(kind, "sub_configs", {})
    text = config.get_text_config()
    return {
        "quantized": getattr(config, "quantization_config", None) is not None,
        "config_class": kind.__name__,
        "source": kind.__module__,
        "config": _plain(config.to_dict()) | _plain(text.to_dict()),
        "known": sorted({*inspect.signature(kind).parameters, *kind.attribute_map, *inner, *own}),
        "aliases": dict(kind.attribute_map),
        "text_key_missing": "text_config" in inner and "text_config" not in written,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON would hold it: dtypes and enums become their names."""
    return {
        k: v if isinstance(v, (int, float, str, bool, list, dict, type(None))) else str(v) for k, v in values.items()
    }


def _first_line(error: Exception, path: Path) -> str:
    """What it says, without the folder's own place."""
    lines = [line.strip() for line in str(error).replace(f"{path}/", "").replace(str(path), "it").splitlines()]
    text = ": ".join(line for line in lines[:3] if line)
    return (text or type(error).__name__)[:300]
