"""Switches of a config that are drawn: booleans, heads, windows, rotary embeddings; those that its class honours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from paritykit.testing.drawn.catalogue import config_class
from paritykit.testing.drawn.fields import Fields, own_fields, takes_none
from paritykit.testing.drawn.roles import Sizes, role_of
from paritykit.testing.drawn.trying import Tried, try_fields

SHARE = 1 / 3
"""How many of the switches are turned."""
HONOURED = 1e-3
"""A switch must move the logits by so much of their size: a thousand times what float32 rounds."""
SOFTCAPS = (3.0, 5.0)
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0},
)  # fmt: skip


def draw_switches(model_type: str, fields: Fields, before: Tried, sizes: Sizes, *, seed: int) -> Fields:
    """``fields`` with some switches turned: those by which the model still works, and computes something else."""
    chance = random.Random(f"{model_type}/{seed}")
    for changed in _offered(model_type, fields, sizes, chance):
        if chance.random() > SHARE:
            continue
        found = try_fields(model_type, {**fields, **changed}, seed=seed)
        if found.works and differs(found, before):
            fields, before = {**fields, **changed}, found
    return fields


def _offered(model_type: str, fields: Fields, sizes: Sizes, chance: random.Random) -> Iterator[Fields]:
    for field in own_fields(config_class(model_type)):
        name, own = field.name, fields.get(field.name, field.default)
        role = role_of(name)
        if isinstance(own, bool):
            yield {name: not own}
        elif role == "kv_heads":
            yield {name: chance.choice([n for n in (1, 2, sizes.heads) if n != own])}
        elif role == "window" and takes_none(field):
            yield {name: None if own is not None else sizes.window}
        elif "softcap" in name or "soft_cap" in name:
            yield {name: chance.choice(SOFTCAPS)}
        elif name == "rope_parameters" and name not in fields:
            yield {name: {"rope_theta": chance.choice((500.0, 100000.0)), **chance.choice(ROPES)}}


def differs(found: Tried, before: Tried) -> bool:
    """Whether two models have other weights or compute something else."""
    if found.state != before.state:
        return True
    return bool((found.logits - before.logits).abs().max() > HONOURED * before.logits.abs().max())
