"""A config class's own fields, made small: integers by what they are for, lists of layers by the kinds of layers."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from paritykit.testing.drawn.catalogue import config_class, find_class
from paritykit.testing.drawn.roles import Sizes, role_of, small

Fields = dict[str, Any]
MOST_LAYERS = 8
"""However many kinds of layers there are."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
QUIET = 0
"""The id of a special token that cannot be left out."""


def own_fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields that a config class adds to those of every config."""
    from transformers import PreTrainedConfig

    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return [f for f in dataclasses.fields(kind) if f.name not in base and f.init]


def takes_none(field: dataclasses.Field[Any]) -> bool:
    """Whether the field may be None."""
    return "None" in str(field.type) or "Optional" in str(field.type)


def small_fields(kind: Any, sizes: Sizes) -> Fields:
    """The fields of a config class that are to be other than its defaults, for a small model of all kinds of layers.

    What a class works out by itself (a field that is None or a word by default) is left to it. A part that is a config
    of its own is a table.
    """
    found = {n: v for f in own_fields(kind) if (n := f.name) and (v := _small_field(f, sizes)) is not None}
    found |= {n: None if takes_none(f) else QUIET for f in own_fields(kind) if (n := f.name) in TOKENS}
    layers = layer_lists(kind(), sizes)
    count = len(next(iter(layers.values()))) if layers else sizes.layers
    parts = {name: small_fields(part, sizes) for name, part in nested(kind)}
    return {**found, **layers, **parts, **{n: count for n in found if role_of(n) == "layers"}}


def _small_field(field: dataclasses.Field[Any], sizes: Sizes) -> Any:
    """The field's value made small; None where nothing is to be said."""
    value = field.default if field.default is not dataclasses.MISSING else None
    if isinstance(value, bool) or field.name in TOKENS:
        return None
    if isinstance(value, int):
        made = small(field.name, value, sizes)
        return None if made == value else made
    return None


def layer_lists(config: Any, sizes: Sizes) -> Fields:
    """The lists of ``config`` that say something of each layer, for a few layers among which every kind is."""
    text = config.get_text_config(decoder=True)
    count = int(getattr(text, "num_hidden_layers", 0))
    values = {f.name: vars(text).get(f.name) for f in own_fields(type(text))}
    whole = {n: list(v) for n, v in values.items() if isinstance(v, list | tuple) and count and len(v) == count}
    some = {n: list(v) for n, v in values.items() if n not in whole and count and _is_some_layers(n, v, count)}
    if not whole and not some:
        return {}
    kinds = [(*(str(v[i]) for v in whole.values()), *(i in v for v in some.values())) for i in range(count)]
    chosen = chosen_layers(kinds, sizes.layers)
    short = {n: [v[i] for i in chosen] for n, v in whole.items()}
    return {**short, **{n: [new for new, old in enumerate(chosen) if old in v] for n, v in some.items()}}


def chosen_layers(kinds: list[tuple[Any, ...]], count: int) -> list[int]:
    """The places of ``count`` layers, or of one of each kind where those are more, in their order.

    >>> chosen_layers([("a",), ("a",), ("a",), ("a",), ("a",), ("b",)], 4)
    [0, 1, 2, 5]
    """
    first = sorted({kind: place for place, kind in reversed(list(enumerate(kinds)))}.values())[:MOST_LAYERS]
    others = [n for n in range(len(kinds)) if n not in first]
    return sorted(first + others[: max(count - len(first), 0)])


def _is_some_layers(name: str, value: Any, count: int) -> bool:
    """Whether these are the places of some layers among all."""
    if not isinstance(value, list | tuple) or ("layer" not in name and "idx" not in name):
        return False
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < count for v in value)
    return bool(value) and whole and len(set(value)) == len(value)


def layer_kinds(model_type: str) -> list[str]:
    """The kinds of layers that a class's own source names, of those that transformers has."""
    from transformers import configuration_utils as known

    source = inspect.getsource(sys.modules[find_class(model_type).__module__])
    source += inspect.getsource(sys.modules[config_class(model_type).__module__])
    allowed = known.ALLOWED_LAYER_TYPES if hasattr(known, "ALLOWED_LAYER_TYPES") else ()
    return [kind for kind in allowed if f'"{kind}"' in source]


def nested(kind: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a config class that are configs of their own: name and class."""
    for name, part in getattr(kind, "sub_configs", {}).items():
        if dataclasses.is_dataclass(part):
            yield name, part
