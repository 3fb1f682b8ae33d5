"""``drawn_model``: a tiny seeded checkpoint of any causal language model that transformers has."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paritykit.errors import EngineMissingError, UnknownNameError, UsageError
from paritykit.testing.drawn.catalogue import class_names, config_class, is_plain
from paritykit.testing.drawn.fields import Fields, own_fields, small_fields
from paritykit.testing.drawn.roles import Sizes
from paritykit.testing.drawn.search import find_working
from paritykit.testing.drawn.switches import draw_switches
from paritykit.testing.drawn.trying import STAGES, Tried, try_fields
from paritykit.testing.folders import empty_folder, is_complete, kept_folder, no_progress_bar, publish
from paritykit.testing.tiny import DTYPES

RECIPE = 3
"""Version of the way models are drawn; part of the cache key."""


def drawn_model(
    model_type: str, path: str | os.PathLike[str] | None = None, *, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Write a tiny seeded checkpoint (config.json, safetensors, no tokenizer) and return its folder.

    ``model_type`` is one that transformers makes a causal language model of. Its config is that of its class, made
    small; with a ``seed`` other than 0, some of its switches are turned. What does not work is mended by what its
    error says; in the end the model has run on a few tokens, is causal, and every token matters to those after it.
    Without ``path`` the folder lies in the Hugging Face assets cache and is reused.

    Raises UnknownNameError for an unknown model type or dtype, UsageError where no small config works or the folder
    cannot be written, EngineMissingError without transformers.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("drawn model dtype", dtype, DTYPES)
    if model_type not in class_names():
        raise UnknownNameError("model type of a causal language model", model_type, class_names())
    if not is_plain(model_type):
        raise UsageError(f"no model of {model_type!r} is drawn: more than text goes into it")
    try:
        target = _cache_folder(model_type, seed, dtype) if path is None else empty_folder(Path(path))
        if not is_complete(target):
            publish(target, lambda folder: _build(model_type, folder, seed=seed, dtype=dtype))
    except OSError as error:
        raise UsageError(f"cannot write the drawn model {model_type!r}: {error}") from error
    return target


def draw_fields(model_type: str, *, seed: int = 0) -> tuple[Fields, Tried]:
    """The fields of a small config that works, and the model that was tried. Raises UsageError where none was found."""
    sizes = draw_sizes(seed)
    fields, tried = find_working(model_type, small_fields(config_class(model_type), sizes), sizes, seed=seed)
    if not tried.works:
        raise UsageError(
            f"no small config of {model_type!r} works: at stage {STAGES[tried.stage]!r}, {tried.error.strip()}"
        )
    if seed:
        fields = draw_switches(model_type, fields, tried, sizes, seed=seed)
        tried = try_fields(model_type, fields, seed=seed)
    return fields, tried


def draw_sizes(seed: int) -> Sizes:
    """The few sizes that all others follow; with another seed than 0, other ones."""
    if not seed:
        return Sizes()
    digest = hashlib.sha256(f"sizes/{seed}".encode()).digest()
    return Sizes(inner=(192, 320, 256)[digest[0] % 3], vocabulary=(499, 509, 521)[digest[1] % 3])


def _cache_folder(model_type: str, seed: int, dtype: str) -> Path:
    try:
        recipe: list[Any] = [RECIPE, version("transformers"), model_type, seed, dtype]
    except PackageNotFoundError as error:
        raise EngineMissingError("drawn models need transformers: pip install 'paritykit[hf]'") from error
    return kept_folder("drawn", model_type, recipe)


def _build(model_type: str, folder: Path, *, seed: int, dtype: str) -> None:
    import torch

    _, tried = draw_fields(model_type, seed=seed)
    spell_out(tried.model.config)
    with no_progress_bar():
        tried.model.to(getattr(torch, dtype)).save_pretrained(folder)


def spell_out(config: Any) -> None:
    """Write the size of a head into a config that leaves it to be worked out: engines read it where it is published."""
    text = config.get_text_config(decoder=True)
    if "head_dim" in {f.name for f in own_fields(type(text))} or hasattr(text, "head_dim"):
        return
    hidden, heads = (getattr(text, name, None) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(hidden, int) and isinstance(heads, int) and heads:
        text.head_dim = hidden // heads
