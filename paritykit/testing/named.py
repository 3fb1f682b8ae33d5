"""Names of tiny models: ``tiny:llama,num_key_value_heads=1,rope_parameters.rope_theta=500.0``, safe in any shell.

After the family come fields of its config, ``seed`` or ``dtype``, each with a value: a number, ``true``, ``false``,
``null`` or a word. ``table.entry=VALUE`` sets one entry of a table. A list is written with slashes, ``a/b``: ``a/`` has
one item and ``/`` none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paritykit.errors import UsageError
from paritykit.options import read_value
from paritykit.testing.families import tiny_config

TINY = "tiny:"
REAL = "real:"
"""How the name of a trained model begins; see ``paritykit.testing.real``."""
FIELD = re.compile(r"[a-z_]\w*(\.[a-z_]\w*)*", re.IGNORECASE)
WORD = re.compile(r"[\w.+-]+")
OWN = ("seed", "dtype")
"""Fields that are no part of the config."""
RESERVED = ("family", "path")


@dataclass(frozen=True)
class TinyModel:
    """A tiny model, named and not yet built. ``repr`` can be pasted into Python, ``str`` into a command.

    >>> TinyModel("tiny:qwen2,tie_word_embeddings=true,num_key_value_heads=1")
    TinyModel(name='tiny:qwen2,num_key_value_heads=1,tie_word_embeddings=true')

    Raises UnknownNameError for an unknown family, UsageError for a name that cannot be read; whether its fields are
    the family's shows when it is built.
    """

    name: str

    def __post_init__(self) -> None:
        family, fields = read_name(self.name)
        object.__setattr__(self, "name", spell_name(family, fields))

    @classmethod
    def of(cls, family: str, fields: Mapping[str, Any] | None = None) -> TinyModel:
        """The model of a family with some fields changed; an entry of a table is ``{"table.entry": value}``.

        >>> str(TinyModel.of("gemma3", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}))
        'tiny:gemma3,layer_types=full_attention/full_attention,num_hidden_layers=2'
        """
        return cls(spell_name(family, fields or {}))

    @property
    def family(self) -> str:
        """Its family."""
        return read_name(self.name)[0]

    @property
    def fields(self) -> dict[str, Any]:
        """What differs from the family's defaults, as ``tiny_model`` takes it."""
        return read_name(self.name)[1]

    @property
    def config(self) -> dict[str, Any]:
        """Its whole config."""
        return tiny_config(self.family, **{k: v for k, v in self.fields.items() if k not in OWN})

    def build(self, path: str | os.PathLike[str] | None = None) -> Path:
        """The checkpoint's folder: a new one at ``path``, or one in the cache. Raises as ``tiny_model`` does."""
        from paritykit.testing.tiny import tiny_model

        return tiny_model(self.family, path, **self.fields)

    def __str__(self) -> str:
        return self.name


def read_name(name: str) -> tuple[str, dict[str, Any]]:
    """Family and fields of a tiny model's name. Raises UnknownNameError, UsageError.

    >>> read_name("tiny:qwen3_moe,mlp_only_layers=0/,rms_norm_eps=1e-05,dtype=bfloat16")
    ('qwen3_moe', {'mlp_only_layers': [0], 'rms_norm_eps': 1e-05, 'dtype': 'bfloat16'})
    """
    if not name.startswith(TINY):
        raise UsageError(f"{name!r} is not the name of a tiny model: it does not begin with {TINY!r}")
    family, fields = split_name(name, prefix=TINY)
    _check(family, fields)
    return family, fields


def split_name(name: str, *, prefix: str) -> tuple[str, dict[str, Any]]:
    """What stands behind ``prefix`` before the first comma, and the fields behind it. Raises UsageError.

    >>> split_name("real:smollm2,family=mistral", prefix="real:")
    ('smollm2', {'family': 'mistral'})
    """
    first, *pairs = name.removeprefix(prefix).split(",")
    fields: dict[str, Any] = {}
    for pair in pairs:
        field, _, text = pair.partition("=")
        if not text or not FIELD.fullmatch(field):
            raise UsageError(f"{name!r}: {pair!r} is not of the form FIELD=VALUE")
        if field in fields:
            raise UsageError(f"{name!r}: {field} is set twice")
        fields[field] = _read(text)
    return first, fields


def spell_name(family: str, fields: Mapping[str, Any]) -> str:
    """The name of a family's model with these fields, in alphabetical order. Raises UsageError for other values."""
    pairs = (f"{field}={_spell(field, value)}" for field, value in sorted(fields.items()))
    return TINY + ",".join((family, *pairs))


def _check(family: str, fields: Mapping[str, Any]) -> None:
    """Raise UsageError for what shows without building the model."""
    wrong = next((f for f in RESERVED if f in fields), None)
    if wrong is not None:
        raise UsageError(f"tiny model {family!r} has no field {wrong!r} to set")
    seed = fields.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"tiny model {family!r}: seed must be an integer, not {seed!r}")
    tiny_config(family, **{k: v for k, v in fields.items() if k not in OWN})


def _read(text: str) -> Any:
    return [read_value(item) for item in text.split("/") if item] if "/" in text else read_value(text)


def _spell(field: str, value: Any) -> str:
    if not isinstance(value, list | tuple):
        return _spell_one(field, value)
    items = [_spell_one(field, item) for item in value]
    return "/".join(items) + "/" * (len(items) < 2)


def _spell_one(field: str, value: Any) -> str:
    for constant, text in ((None, "null"), (True, "true"), (False, "false")):
        if value is constant:
            return text
    text = str(value)
    if isinstance(value, str | int | float) and WORD.fullmatch(text) and read_value(text) == value:
        return text
    raise UsageError(f"{field}={value!r} cannot be part of a tiny model's name")
