"""Rotary embeddings of tiny models."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from paritykit.strategies.fields import Fields, Limits, merged, optional

THETAS = (10000.0, 100.0, 1e6)
FACTORS = (2.0, 4.0, 8.0)
PARTS = (0.5, 0.75, 0.25)
FEW_KINDS = {"phi3": ("default",)}
"""Config classes that take no others of these, by ``model_type``."""


def rope(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """Rotary embedding: its base, its kind, how much of a head is rotated; of several, the first is of any kind."""
    table = own.get("rope_parameters")
    if table is None:
        return st.just({})
    nested = all(isinstance(entry, dict) for entry in table.values())
    places = [f"rope_parameters.{name}." for name in table] if nested else ["rope_parameters."]
    bases = optional(None, {f"{place}rope_theta": st.sampled_from(THETAS) for place in places})
    kinds = [k for k in limits.ropes if k in FEW_KINDS.get(own["model_type"], limits.ropes)] or ["default"]
    scaled = st.one_of([_scaling(kind, own["max_position_embeddings"], nested=nested) for kind in kinds])
    named = scaled.map(lambda entries: {places[0] + name: value for name, value in entries.items()})
    if "partial_rotary_factor" not in own:
        return merged(bases, named)
    part = {f"{places[0]}partial_rotary_factor": st.sampled_from(PARTS)}
    return merged(bases, named, optional(None, part))


def _scaling(kind: str, positions: int, *, nested: bool) -> st.SearchStrategy[Fields]:
    """Entries of one kind; what a model was first trained for times the factor is what it has now.

    ``nested``: each kind of layer has entries of its own. Of those transformers does not read ``truncate``.
    """
    if kind == "default":
        return st.just({})
    needed: dict[str, st.SearchStrategy[Any]] = {"rope_type": st.just(kind), "factor": st.sampled_from(FACTORS)}
    if kind == "llama3":
        needed |= {"low_freq_factor": st.sampled_from((1.0, 2.0)), "high_freq_factor": st.sampled_from((4.0, 8.0))}
    extra: dict[str, st.SearchStrategy[Any]] = {}
    if kind == "yarn":
        extra = {
            "beta_fast": st.just(16.0),
            "beta_slow": st.just(2.0),
            "attention_factor": st.just(1.25),
        } | ({} if nested else {"truncate": st.just(False)})
    found = st.fixed_dictionaries(needed, optional=extra)
    if kind in ("linear", "dynamic"):
        return found
    return found.map(lambda e: {**e, "original_max_position_embeddings": int(positions / e["factor"])})
