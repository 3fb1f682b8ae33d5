"""What an integer of a config is for, read from the words of its name, and how small it can be.

No model family is named here: these are the words in which configs of any family speak of sizes and counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU: chunks of attention are as many, or more."""
LARGEST_KEPT = 4
"""Counts up to here stay as they are: kernel widths, expansions, numbers of shared experts."""
COUNTED = (
    "heads",
    "kv_heads",
    "linear_heads",
    "chosen",
    "expert_groups",
    "period",
    "offset",
    "some_layers",
    "last_layer",
)
"""Roles in which a small number is no width or expansion and is made smaller still."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The few sizes that all others follow."""

    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 192
    expert_inner: int = 64
    experts: int = 8
    chosen: int = 2
    groups: int = 2
    layers: int = 4
    window: int = 16
    chunk: int = 32
    state: int = 32
    rank: int = 32
    vocabulary: int = 499
    positions: int = 512


ROLES: tuple[tuple[str, str], ...] = (
    ("kept", r"_token_id$|_index$|_id$|^seed$|beta|alpha|temperature|num_labels|dropout"),
    ("positions", r"position_embeddings$|n_positions|n_ctx|max_seq_len|max_length$|context_length|max_\w*positions"),
    ("vocabulary", r"vocab(?!.*_by$)"),
    ("latent", r"kv_lora_rank|qk_rope_head_dim|index_head_dim"),
    ("rotary", r"rotary_dim|rot_dim"),
    ("kv_heads", r"(kv|key_value|query_groups|kv_n).*heads?$|query_groups$|kv_heads?"),
    ("head_dim", r"head_?dim|d_head|dim_head|head_size|kv_channels|d_kv"),
    ("linear_heads", r"(mamba|linear|ssm).*heads?$|^num_heads$"),
    ("heads", r"(^|_)heads?(_|$)"),
    ("chosen", r"per_tok|(^|_)top_?k$|_k$|topk$"),
    ("expert_groups", r"^n_group$|^topk_group$|expert_group"),
    ("expert_inner", r"(moe|expert).*(intermediate|ffn|hidden|inner)|shared_expert_intermediate"),
    ("shared", r"shared_experts?$|experts?_shared|zero_expert"),
    ("experts", r"experts?(_num)?$|num_experts|expert_num"),
    ("inner", r"intermediate|ffn|d_inner|n_inner|dim_ff|dff|feed_forward|mlp_dim"),
    ("period", r"period|interval|every|layer_step|sparse_step|pattern"),
    ("offset", r"offset"),
    ("last_layer", r"layer_end"),
    ("some_layers", r"replace|dense_layers|window_layers|shared_layers|layer_start|nextn|mtp"),
    ("layers", r"(^|_)(layers?|blocks)$"),
    ("attention_chunk", r"attention_chunk"),
    ("window", r"window|local_attention"),
    ("chunk", r"chunk"),
    ("rank", r"rank"),
    ("state", r"state|index_topk"),
    ("groups", r"groups?$"),
    ("hidden", r"hidden|embd|d_model|n_embed|emb_?dim|embedding|proj_dim|width|d_ssm|(^|_)dim$|embed_dim"),
)
"""The first that is found in a name is what the integer is for."""


def role_of(name: str) -> str:
    """What an integer of that name is for; ``other`` where its name says nothing.

    >>> [role_of(n) for n in ("n_embd", "num_key_value_heads", "moe_intermediate_size", "attn_layer_period", "foo")]
    ['hidden', 'kv_heads', 'expert_inner', 'period', 'other']
    """
    own = name.rpartition(".")[2]
    return next((role for role, words in ROLES if re.search(words, own, re.IGNORECASE)), "other")


def small(name: str, value: int, sizes: Sizes) -> int:
    """``value`` made small, by what an integer of that ``name`` is for.

    >>> small("hidden_size", 4096, Sizes()), small("attn_layer_period", 8, Sizes()), small("conv_kernel", 4, Sizes())
    (128, 2, 4)
    """
    role = role_of(name)
    if role in ("kept", "latent") or (value <= LARGEST_KEPT and role not in (*COUNTED, "layers")):
        return value
    if role == "other":
        return value if value <= sizes.window else min(value, sizes.head_dim)
    most = limit_of(role, sizes)
    return most if role in SET else min(value, most)


def usual(name: str, sizes: Sizes) -> int:
    """What an integer of that name is where its class says nothing of it."""
    return small(name, UNKNOWN, sizes)


def limit_of(role: str, sizes: Sizes) -> int:
    """The size, or most, of an integer of that role."""
    fixed = {
        "rotary": sizes.head_dim // 2,
        "attention_chunk": BLOCK,
        "linear_heads": sizes.heads,
        "expert_groups": sizes.groups,
        "shared": sizes.chosen,
        "period": 2,
        "offset": 1,
        "last_layer": sizes.layers - 1,
        "some_layers": max(1, sizes.layers // 2),
    }
    return fixed[role] if role in fixed else int(getattr(sizes, role))


UNKNOWN = 2**20
SET = ("positions", "vocabulary", "head_dim", "heads", "expert_inner", "inner", "layers", "hidden", "last_layer")
"""Roles of which every integer is the same; those of others are no larger than their limit."""
