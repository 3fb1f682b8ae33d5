"""A config that works, looked for from one that does not: by what its error says, one field after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from paritykit.testing.drawn.catalogue import config_class
from paritykit.testing.drawn.fields import Fields, layer_kinds, nested, own_fields, takes_none
from paritykit.testing.drawn.roles import Sizes, role_of, usual
from paritykit.testing.drawn.trying import NOT_CAUSAL, Tried, try_fields

TRIES = 400
"""Configs that are tried of one model at most."""
SECONDS = 60.0
"""So long at most."""
FIXED = ("vocabulary", "kept", "layers", "positions")
"""Roles of integers that are not tried otherwise."""
LEAST = {"hidden": 64, "head_dim": 16, "inner": 64}
MOST = {"heads": 8, "kv_heads": 8, "experts": 8, "chosen": 8, "expert_groups": 8, "shared": 8, "period": 8} | {
    "offset": 3, "some_layers": 3, "last_layer": 3,
}  # fmt: skip
"""By role: between what an integer is tried."""
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def find_working(model_type: str, fields: Fields, sizes: Sizes, *, seed: int) -> tuple[Fields, Tried]:
    """``fields``, mended until they work or until enough was tried, and how far they came."""
    until, left = time.monotonic() + SECONDS, TRIES
    tried, seen = try_fields(model_type, fields, seed=seed), set[str]()
    while not tried.works and (kind := _kind(tried)) not in seen:
        seen.add(kind)
        best: tuple[Fields, Tried] | None = None
        for changed in repairs(model_type, fields, tried.error, sizes):
            left -= 1
            if left < 0 or time.monotonic() > until:
                return fields, tried
            found = try_fields(model_type, changed, seed=seed)
            if _is_further(found, best[1] if best else tried, seen):
                best = (changed, found)
            if found.stage > tried.stage:
                break
        if best is None:
            break
        fields, tried = best
    return fields, tried


def _kind(tried: Tried) -> str:
    """An error without its numbers: with others it is the same one."""
    return f"{tried.stage} " + re.sub(r"\d+", "#", tried.error)


def _is_further(found: Tried, before: Tried, seen: set[str]) -> bool:
    """Whether more works than before; another error at the same place is more too, the first of them."""
    if found.stage != before.stage:
        return found.stage > before.stage
    return _kind(before) in seen and _kind(found) not in seen and not found.error.startswith("MemoryError")


def repairs(model_type: str, fields: Fields, error: str, sizes: Sizes) -> Iterator[Fields]:
    """Changes of one field each, the likeliest first: of those that the error names, then whose values it shows."""
    kind = config_class(model_type)
    yield from _added(model_type, fields, error)
    numbers = {int(n) for n in re.findall(r"\d+", error)[:40]} - {0, 1}

    def rank(place: tuple[str, Any, Any]) -> tuple[bool, ...]:
        _, field, own = place
        return (
            not re.search(rf"\b{re.escape(field.name)}\b", error),
            not (isinstance(own, bool) and NOT_CAUSAL in error),
            not (own is None and "None" in error),
            role_of(field.name) != "kv_heads",
            role_of(field.name) in ("hidden", "heads"),
            not isinstance(own, int) or own not in numbers,
        )

    for part, field, _ in sorted(_places(kind, fields), key=rank):
        table = fields.get(part, {}) if part else fields
        yield from ({**fields, part: new} if part else new for new in _changes(field, table, sizes))


def _places(kind: Any, fields: Fields) -> Iterator[tuple[str, Any, Any]]:
    """The part (empty for the config itself), field and value of everything that may be changed."""
    for part, own in (("", kind), *nested(kind)):
        table = fields.get(part, {}) if part else fields
        for field in own_fields(own):
            yield part, field, table.get(field.name, field.default)


def _added(model_type: str, fields: Fields, error: str) -> Iterator[Fields]:
    """What a class needs and does not have by default: a list of layers, rotary embeddings, an entry of a part."""
    kind = config_class(model_type)
    names, count = {f.name for f in own_fields(kind)}, next((v for n, v in fields.items() if role_of(n) == "layers"), 2)
    kinds = layer_kinds(model_type)
    if "layer_types" in names and len(set(fields.get("layer_types") or ())) < 2 and kinds:
        yield {**fields, "layer_types": [kinds[n % len(kinds)] for n in range(count)]}
        for first in kinds:
            yield from ({**fields, "layer_types": [(first, other)[n % 2] for n in range(count)]} for other in kinds)
    if "rope_parameters" in names and "KeyError" in error:
        yield {**fields, "rope_parameters": {k: {**PLAIN_ROPE} for k in fields.get("layer_types", kinds)}}
    lacking = re.search(r"'(\w+)' object has no attribute 'rope_theta'", error)
    for name, part in nested(kind):
        if lacking and part.__name__ == lacking[1]:
            yield {**fields, name: {**fields.get(name, {}), "rope_theta": PLAIN_ROPE["rope_theta"]}}


def _changes(field: Any, fields: Fields, sizes: Sizes) -> Iterator[Fields]:
    name, own = field.name, fields.get(field.name, field.default)
    if isinstance(own, bool):
        yield {**fields, name: not own}
        return
    if name in fields:
        yield {n: v for n, v in fields.items() if n != name}
    if takes_none(field) and own is not None:
        yield {**fields, name: None}
    if "float" in str(field.type) and own is None:
        yield {**fields, name: 1.0}
    role = role_of(name)
    if "int" not in str(field.type) or role in FIXED:
        return
    wide = sizes.heads * sizes.head_dim
    likely = (usual(name, sizes), sizes.heads, sizes.hidden, wide, 2 * sizes.hidden, sizes.inner, sizes.head_dim)
    now = own if isinstance(own, int) else 0
    for value in dict.fromkeys(
        (usual(name, sizes), 2 * now, now // 2, *likely, sizes.head_dim // 2, 64, 16, 8, 4, 2, 1)
    ):
        if value != own and LEAST.get(role, 1) <= value <= MOST.get(role, value):
            yield {**fields, name: value}
