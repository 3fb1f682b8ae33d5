"""What of a tiny family can be drawn: each aspect a strategy of the config fields that differ from the family's own.

Every aspect shrinks to no field at all. An aspect of which a family has nothing draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from paritykit.testing.families import find_family, tiny_config

Fields = dict[str, Any]

SILENT: Mapping[str, Fields] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {"use_sliding_window": False, "max_window_layers": 28, "attention_bias": False},
    "qwen3_moe": {"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1},
    "gemma2": {"attention_bias": False},
    "gemma3_text": {"attention_bias": False},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "gpt2": {"activation_function": "gelu_new", "tie_word_embeddings": True},
    "opt": {"enable_bias": True, "tie_word_embeddings": True},
}
"""Fields of which the tiny families say nothing, as the config classes have them, by ``model_type``."""
GEMMAS = ("gemma2", "gemma3_text")
"""All Gemmas tie their embeddings, and engines rely on it."""

WIDEST = 512
"""Most elements of all heads together; models are to stay tiny."""
UNIT = 16
"""Widths are multiples of it, as kernels want them."""
WINDOWS = (8, 1, 2, 15, 17, 33, 100, 600)
NORMS = (1e-6, 1e-5, 1e-2)
CAPS = (None, 1.0, 20.0, 50.0)
THETAS = (10000.0, 100.0, 1e6)
FACTORS = (2.0, 4.0, 8.0)
PARTS = (0.5, 0.75, 0.25)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the models must keep to: see ``models``."""

    head_dims: tuple[int, ...]
    ropes: tuple[str, ...]
    ranks: int = 1

    def share(self, heads: int, kv_heads: int) -> bool:
        """Whether so many heads can be shared by the ranks."""
        return not heads % self.ranks and not (kv_heads % self.ranks and self.ranks % kv_heads)


Aspect = Callable[[Fields, Limits], "st.SearchStrategy[Fields]"]


def defaults(family: str) -> Fields:
    """A family's config under the usual names of its fields, with those that it leaves to the config class."""
    found = find_family(family)
    usual = {own: name for name, own in found.aliases.items()}
    config = tiny_config(family)
    return {**SILENT.get(found.model_type, {}), **{usual.get(name, name): value for name, value in config.items()}}


def heads(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """Query heads, kv heads that divide them, their size, and the hidden size where it follows from them."""
    names = [n for n in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size") if n in own]
    grouped, free = "num_key_value_heads" in own, "head_dim" in own
    usual = (own["num_attention_heads"], own.get("num_key_value_heads"), own.get("head_dim", 32))
    found = [
        (kv_heads * group, kv_heads if grouped else None, size)
        for kv_heads in range(1, 5)
        for group in range(1, 5)
        for size in limits.head_dims
        if limits.share(kv_heads * group, kv_heads if grouped else kv_heads * group)
        and kv_heads * group * size <= WIDEST
    ]
    nearest = sorted(set(found), key=lambda c: (sum(a != b for a, b in zip(c, usual, strict=True)), c != usual, c[0]))

    def fields(chosen: tuple[int, int | None, int]) -> Fields:
        count, kv_heads, size = chosen
        hidden = own["hidden_size"] if free else count * size
        values = {"num_attention_heads": count, "num_key_value_heads": kv_heads, "head_dim": size}
        widths = {n: hidden for n in ("hidden_size", "word_embed_proj_dim") if n in own}
        return {n: v for n, v in {**values, **widths}.items() if n in {*names, "word_embed_proj_dim"} and n in own}

    return st.sampled_from(nearest).map(fields)


def widths(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """Widths of the MLP and the experts, and the hidden size where heads do not set it."""
    unit = math.lcm(UNIT, limits.ranks)
    inner = st.integers(1, 16).map(lambda n: n * unit)
    outer = st.integers(2, 12).map(lambda n: n * UNIT)
    found = {n: inner for n in ("intermediate_size", "moe_intermediate_size") if n in own}
    free = {"hidden_size"} if "head_dim" in own else {"word_embed_proj_dim"}
    return st.fixed_dictionaries({}, optional={**found, **{n: outer for n in free if n in own}})


@st.composite
def layers(draw: st.DrawFn, own: Fields, limits: Limits) -> Fields:
    """How many layers, and of which kind each is where the family names kinds."""
    del limits
    count = draw(st.sampled_from((own["num_hidden_layers"], 1, 2, 3)))
    found: Fields = {"num_hidden_layers": count}
    if "layer_types" in own and draw(st.booleans()):
        kind = st.sampled_from(("full_attention", "sliding_attention"))
        found["layer_types"] = draw(st.lists(kind, min_size=count, max_size=count))
    return found


def window(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """The sliding window: another one, one where there is none, none where there is one."""
    del limits
    size = st.sampled_from(WINDOWS)
    if "use_sliding_window" in own:
        parts = {"use_sliding_window": st.just(True), "sliding_window": size}
        if "max_window_layers" in own:
            parts["max_window_layers"] = st.integers(0, 2)
        return st.just({}) | st.fixed_dictionaries(parts)
    if "sliding_window" not in own:
        return st.just({})
    chosen = size if "layer_types" in own else st.none() | size
    return st.fixed_dictionaries({}, optional={"sliding_window": chosen})


def experts(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """How many experts, how many of them for a token, and which layers have any."""
    del limits
    name = next((n for n in ("num_local_experts", "num_experts") if n in own), None)
    if name is None:
        return st.just({})
    pairs = [(count, chosen) for count in (own[name], 2, 3, 4, 5) for chosen in (2, 1, 3, 4) if chosen <= count]
    counts = st.sampled_from(pairs).map(lambda pair: {name: pair[0], "num_experts_per_tok": pair[1]})
    if "mlp_only_layers" not in own:
        return counts
    dense = st.lists(st.integers(0, 3), unique=True, max_size=2).map(sorted)
    return merged(counts, _optional(own, {"mlp_only_layers": dense, "decoder_sparse_step": st.just(2)}))


def rope(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """Rotary embedding: its base, its kind, how much of a head is rotated; of several, the first is of any kind."""
    table = own.get("rope_parameters")
    if table is None:
        return st.just({})
    nested = all(isinstance(entry, dict) for entry in table.values())
    places = [f"rope_parameters.{name}." for name in table] if nested else ["rope_parameters."]
    bases = _optional(None, {f"{place}rope_theta": st.sampled_from(THETAS) for place in places})
    kinds = [k for k in limits.ropes if own["model_type"] not in FEW_KINDS or k in FEW_KINDS[own["model_type"]]]
    scaled = st.one_of([_scaling(kind, own["max_position_embeddings"]) for kind in kinds])
    named = scaled.map(lambda entries: {places[0] + name: value for name, value in entries.items()})
    if "partial_rotary_factor" not in own:
        return merged(bases, named)
    part = {f"{places[0]}partial_rotary_factor": st.sampled_from(PARTS)}
    return merged(bases, named, _optional(None, part))


FEW_KINDS = {"phi3": ("default", "linear")}
"""Config classes that take others for something else, by ``model_type``."""


def _scaling(kind: str, positions: int) -> st.SearchStrategy[Fields]:
    """Entries of one kind; what a model was first trained for times the factor is what it has now."""
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
            "truncate": st.just(False),
        }
    found = st.fixed_dictionaries(needed, optional=extra)
    if kind in ("linear", "dynamic"):
        return found
    return found.map(lambda e: {**e, "original_max_position_embeddings": int(positions / e["factor"])})


def _scalars(choices: Mapping[str, st.SearchStrategy[Any]], *, but: tuple[str, ...] = ()) -> Aspect:
    """An aspect of fields that are independent of each other, of families whose ``model_type`` is not in ``but``."""

    def aspect(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
        del limits
        return st.just({}) if own["model_type"] in but else _optional(own, choices)

    return aspect


def _optional(own: Fields | None, choices: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Fields]:
    """Some of ``choices``, of those only that are in ``own`` where it is given."""
    return st.fixed_dictionaries({}, optional={n: s for n, s in choices.items() if own is None or n in own})


def merged(*parts: st.SearchStrategy[Fields]) -> st.SearchStrategy[Fields]:
    """The fields of all parts; of a field in several, the last."""
    return st.tuples(*parts).map(lambda found: {n: v for part in found for n, v in part.items()})


VOCABULARY = st.sampled_from((65, 127, 129, 1023)) | st.integers(17, 1100).filter(lambda size: size % 64)
ASPECTS: Mapping[str, Aspect] = {
    "heads": heads,
    "widths": widths,
    "layers": layers,
    "window": window,
    "experts": experts,
    "rope": rope,
    "vocabulary": _scalars({"vocab_size": VOCABULARY}),
    "tied": _scalars({"tie_word_embeddings": st.booleans()}, but=GEMMAS),
    "biases": _scalars({n: st.booleans() for n in ("attention_bias", "mlp_bias", "enable_bias")}),
    "norm": _scalars({n: st.sampled_from(NORMS) for n in ("rms_norm_eps", "layer_norm_epsilon")}
                     | {"do_layer_norm_before": st.booleans()}),
    "softcaps": _scalars({n: st.sampled_from(CAPS) for n in ("attn_logit_softcapping", "final_logit_softcapping")}),
    "scale": _scalars({"query_pre_attn_scalar": st.sampled_from((32, 16, 64, 256))}),
    "routing": _scalars({"norm_topk_prob": st.booleans()}),
    "activation": _scalars({"activation_function": st.sampled_from(("gelu", "relu", "gelu_new"))}),
}  # fmt: skip
"""By name: what can be drawn of a family."""
