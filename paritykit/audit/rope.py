"""Rules on rotary settings that are given twice, under an old and a new name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice

MEANT = {("su", "longrope"), ("mrope", "default")}
"""Old and new type that mean one thing."""
LEGACY_BASES = {"rope_theta": "full_attention", "rope_local_base_freq": "sliding_attention"}


def both_names(folder: Folder) -> Iterator[Notice]:
    """``rope_theta`` and ``rope_scaling`` beside ``rope_parameters``."""
    for prefix, config in _parts(folder):
        new = config.get("rope_parameters")
        if not isinstance(new, dict):
            continue
        for key, old, given in _pairs(config, new):
            yield _twice(folder, f"{prefix}{key}", old, given)


def _parts(folder: Folder) -> Iterator[tuple[str, dict[str, Any]]]:
    """The config and its sub-configs, each with its key."""
    yield "", folder.config
    for name, value in folder.config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            yield f"{name}.", value


def _pairs(config: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Old key, its value, and the value under the new name."""
    nested = {k: v for k, v in new.items() if isinstance(v, dict)}
    for key, layer in LEGACY_BASES.items():
        block = nested.get(layer, {}) if nested else new if key == "rope_theta" else {}
        if config.get(key) is not None and block.get("rope_theta") is not None:
            yield key, config[key], block["rope_theta"]
    if isinstance(old := config.get("rope_scaling"), dict) and old:
        blocks = list(nested.values()) if nested else [new]
        theirs = _scaling(old)
        match = next((b for b in blocks if _scaling(b) == theirs), blocks[-1])
        yield "rope_scaling", theirs, _scaling(match)


def _scaling(block: dict[str, Any]) -> dict[str, Any]:
    """A scaling without its spelling: the type under its new name, no theta, ``default`` for none."""
    kind = block.get("rope_type", block.get("type", "default"))
    rest = {k: v for k, v in block.items() if k not in ("rope_theta", "type", "rope_type")}
    return {"rope_type": kind, **rest}


def _twice(folder: Folder, key: str, old: Any, new: Any) -> Notice:
    used = folder.model.config.get("rope_parameters")
    effect = f"this version uses {used}" if used else "uses one of them"
    return Notice(
        code="rope-both-names",
        severity="note" if old == new else "error",
        place=key,
        message=f"{key} is {old} and rope_parameters says {new}"
        + ("" if old != new else ": the same under both names"),
        hf=f"{effect}; version 4 reads {key}" if old != new else "reads either",
        vllm="asks the installed transformers, so it uses the same; with version 4 it reads the old name"
        if old != new
        else "reads either",
        fix=f"delete the one that is wrong; keep only rope_parameters for transformers 5, only {key} for version 4",
    )


def two_types(folder: Folder) -> Iterator[Notice]:
    """``type`` and ``rope_type`` in one block."""
    for place, block in _blocks(folder):
        old, new = block.get("type"), block.get("rope_type")
        if old is None or new is None or old == new or (old, new) in MEANT:
            continue
        yield Notice(
            code="rope-type-conflict",
            severity="error",
            place=place,
            message=f"{place} says type {old!r} and rope_type {new!r}",
            hf=f"takes rope_type: {new}",
            vllm="refuses to start: conflicts between rope_type and type",
            fix="delete type",
        )


def _blocks(folder: Folder) -> Iterator[tuple[str, dict[str, Any]]]:
    for prefix, config in _parts(folder):
        for key in ("rope_parameters", "rope_scaling"):
            block = config.get(key)
            if not isinstance(block, dict):
                continue
            yield f"{prefix}{key}", block
            yield from ((f"{prefix}{key}.{k}", v) for k, v in block.items() if isinstance(v, dict))


RULES = (both_names, two_types)
