"""The tiny model families, as data: every switch set so that a mistake in it shows.

No value is left where an engine that ignores it would be right by luck: rope theta, norm epsilon, score scale and
widths differ from the usual defaults, sliding windows and softcaps are small enough to bite, kv heads differ from
heads, and the vocabulary is a prime number, so that padding and sharding of it show.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from paritykit.errors import UnknownNameError, UsageError


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One family: its Hugging Face ``model_type`` and config fields.

    ``layer_types`` is repeated to the number of layers. ``embedding_scaled`` says that the model multiplies its
    embedding by ``sqrt(hidden)``. ``sharpness`` is the gain of what makes the attention scores: at 1 attention is an
    average over all keys, which hides its faults, and much above it bf16 noise grows. ``aliases`` are the usual names
    of fields that the family calls otherwise.
    """

    model_type: str
    config: dict[str, Any]
    layer_types: tuple[str, ...] = ()
    embedding_scaled: bool = False
    sharpness: float = 1.5
    aliases: dict[str, str] = {}


_TOKENS = {"vocab_size": 499, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_NARROW: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
}
_WIDE_HEADS = {**_NARROW, "hidden_size": 96, "head_dim": 32}
_GEMMA = {**_WIDE_HEADS, "query_pre_attn_scalar": 24, "sliding_window": 16, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "qwen2": Family(model_type="qwen2", config=_NARROW),
    "llama": Family(model_type="llama", config=_WIDE_HEADS),
    "llama_tied": Family(model_type="llama", config={**_WIDE_HEADS, "tie_word_embeddings": True}),
    "mistral": Family(model_type="mistral", config={**_WIDE_HEADS, "sliding_window": 16}),
    "qwen3": Family(model_type="qwen3", config=_WIDE_HEADS),
    "gemma2": Family(
        model_type="gemma2",
        config={**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        layer_types=("sliding_attention", "full_attention"),
        embedding_scaled=True,
    ),
    "gemma3": Family(
        model_type="gemma3_text",
        config={
            **_GEMMA,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 200000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        layer_types=("sliding_attention", "sliding_attention", "full_attention"),
        embedding_scaled=True,
        sharpness=1.0,
    ),
    "mixtral": Family(
        model_type="mixtral",
        config={**_WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        config={
            **_WIDE_HEADS,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [1],
        },
    ),
    "phi3": Family(model_type="phi3", config={**_NARROW, "original_max_position_embeddings": 512}),
    "gpt2": Family(
        model_type="gpt2",
        config={
            **_TOKENS,
            "n_embd": 128,
            "n_inner": 320,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "layer_norm_epsilon": 1e-3,
        },
        sharpness=2.0,
        aliases={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
    "opt": Family(
        model_type="opt",
        config={
            **_TOKENS,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "activation_function": "relu",
            "do_layer_norm_before": True,
        },
        sharpness=2.0,
        aliases={"intermediate_size": "ffn_dim"},
    ),
}
TINY_FAMILIES: tuple[str, ...] = tuple(FAMILIES)
ROPE_ENTRIES = (
    "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "mscale",
    "mscale_all_dim", "short_factor", "long_factor",
)  # fmt: skip
"""What ``rope_parameters`` may hold; transformers passes over others."""


def nano_families() -> list[str]:
    """The families that engine ``nano`` has."""
    from paritykit.engines.nano.architectures import ARCHITECTURES

    known = {a.model_type for a in ARCHITECTURES.values()}
    return [name for name, family in FAMILIES.items() if family.model_type in known]


def find_family(family: str) -> Family:
    """The family of that name. Raises UnknownNameError with the nearest names."""
    if family not in FAMILIES:
        raise UnknownNameError("tiny model family", family, FAMILIES)
    return FAMILIES[family]


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The config of a tiny model, as a plain dict of config fields and ``model_type``; loads no torch.

    ``overrides`` replace fields, ``**{"table.entry": value}`` one entry of a table; whether the config class knows a
    field is checked where the model is built. Raises UnknownNameError for an unknown family or entry, UsageError for
    ``model_type`` or a value that JSON cannot hold.
    """
    found = find_family(family)
    if "model_type" in overrides:
        raise UsageError(f"the model_type of tiny model {family!r} cannot be overridden; choose another family")
    whole = {found.aliases.get(name, name): value for name, value in overrides.items() if "." not in name}
    fields = _copy(family, {**found.config, **whole})
    for name in sorted(n for n in overrides if "." in n):
        _set_entry(family, fields, name, value=overrides[name])
    if found.layer_types:
        fields.setdefault("layer_types", _repeat(found.layer_types, fields["num_hidden_layers"]))
    return {"model_type": found.model_type, **_copy(family, fields)}


def _copy(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    try:
        copied: dict[str, Any] = json.loads(json.dumps(fields))
    except (TypeError, ValueError) as error:
        raise UsageError(f"tiny model {family!r}: an override is not plain data: {error}") from error
    return copied


def _set_entry(family: str, fields: dict[str, Any], name: str, *, value: Any) -> None:
    """Set the entry of a table that ``name`` spells with dots."""
    *tables, entry = name.split(".")
    table = fields
    for part in tables:
        inner = {n: t for n, t in table.items() if isinstance(t, dict)}
        if part not in inner:
            raise UnknownNameError(f"table in {name!r} of tiny model {family!r}", part, inner)
        table = inner[part]
    if entry not in table and entry not in ROPE_ENTRIES:
        raise UnknownNameError(f"entry in {name!r} of tiny model {family!r}", entry, {*table, *ROPE_ENTRIES})
    table[entry] = value


def _repeat(pattern: tuple[str, ...], count: Any) -> list[str]:
    if not isinstance(count, int):
        raise UsageError(f"num_hidden_layers must be an int, not {count!r}")
    return [pattern[i % len(pattern)] for i in range(count)]
