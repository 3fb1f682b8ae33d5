"""What of a tiny family can be drawn: each aspect a strategy of the config fields that differ from the family's own.

Every aspect shrinks to no field at all. An aspect of which a family has nothing draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from paritykit.errors import UsageError
from paritykit.strategies.fields import Fields, Limits, merged, optional
from paritykit.strategies.ropes import rope

GEMMAS = ("gemma2", "gemma3_text")
"""All Gemmas tie their embeddings, and engines rely on it."""

WIDEST = 512
"""Most elements of all heads together; models are to stay tiny."""
NARROW = 32
"""The size of a head where the family names none."""
WIDE = 192
"""Most hidden elements where heads do not set them."""
UNIT = 16
"""Widths are multiples of it, as kernels want them."""
WINDOWS = (8, 1, 2, 15, 17, 33, 100, 600)
NORMS = (1e-6, 1e-5, 1e-2)
CAPS = (None, 1.0, 20.0, 50.0)

Aspect = Callable[[Fields, Limits], "st.SearchStrategy[Fields]"]


def heads(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """Query heads, kv heads that divide them, their size, and the hidden size, which follows where heads have none."""
    free = "head_dim" in own
    sizes = sorted(limits.head_dims, key=lambda size: (size != own.get("head_dim", NARROW), size))

    def fields(counts: tuple[int, int], size: int, step: int) -> Fields:
        count, kv_heads = counts
        narrow = size if count * size <= WIDEST else min(sizes)
        hidden = _hidden(own["hidden_size"], count, step) if free else count * narrow
        found = {"num_attention_heads": count, "num_key_value_heads": kv_heads, "head_dim": narrow}
        return {n: v for n, v in {**found, "hidden_size": hidden, "word_embed_proj_dim": hidden}.items() if n in own}

    steps = st.integers(0, WIDE // UNIT if free else 0)
    return st.builds(fields, st.sampled_from(_counts(own, limits)), st.sampled_from(sizes), steps)


def _counts(own: Fields, limits: Limits) -> list[tuple[int, int]]:
    """Query heads and kv heads, the family's own first, then what is like it."""
    grouped = "num_key_value_heads" in own
    usual = (own["num_attention_heads"], own.get("num_key_value_heads", own["num_attention_heads"]))
    pairs = {(kv * group, kv if grouped else kv * group) for kv in range(1, 5) for group in range(1, 5)}
    narrow = min(limits.head_dims)
    found = [pair for pair in pairs if limits.share(*pair) and pair[0] * narrow <= WIDEST]
    if not found:
        raise UsageError(f"no heads of {narrow} elements, {WIDEST} in all, for {limits.ranks} ranks to share")
    return sorted(found, key=lambda pair: (sum(a != b for a, b in zip(pair, usual, strict=True)), pair))


def _hidden(usual: int, count: int, step: int) -> int:
    """A hidden size that config classes take for so many heads: the usual one at step 0, then others in turn."""
    unit = math.lcm(UNIT, count)
    sizes = [n for n in (usual,) if not n % count] + [n for n in range(unit, WIDE + 1, unit) if n != usual]
    return sizes[step % len(sizes)]


def _heads(own: Fields, limits: Limits) -> list[tuple[int, int, int]]:
    """Query heads, kv heads and size of a head, the family's own first, then what is like it."""
    usual = (own["num_attention_heads"], own.get("num_key_value_heads"), own.get("head_dim", 32))
    grouped = "num_key_value_heads" in own
    found = {
        (kv_heads * group, kv_heads if grouped else kv_heads * group, size)
        for kv_heads in range(1, 5)
        for group in range(1, 5)
        for size in limits.head_dims
        if kv_heads * group * size <= WIDEST
    }
    shared = [(count, kv_heads, size) for count, kv_heads, size in found if limits.share(count, kv_heads)]
    if not shared:
        raise UsageError(f"no heads of {limits.head_dims} elements, {WIDEST} in all, for {limits.ranks} ranks to share")
    return sorted(shared, key=lambda one: (sum(a != b for a, b in zip(one, usual, strict=True)), one))


def widths(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
    """Widths of the MLP, the experts, and of an embedding that has one of its own."""
    unit = math.lcm(UNIT, limits.ranks)
    inner = st.integers(1, 16).map(lambda n: n * unit)
    outer = st.integers(2, 12).map(lambda n: n * UNIT)
    choices = {"intermediate_size": inner, "moe_intermediate_size": inner, "word_embed_proj_dim": outer}
    needed = {n: s for n, s in choices.items() if s is inner and n in own and own[n] % limits.ranks}
    return merged(optional(own, choices), st.fixed_dictionaries(needed))


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
    return merged(counts, optional(own, {"mlp_only_layers": dense, "decoder_sparse_step": st.just(2)}))


def _scalars(choices: Mapping[str, st.SearchStrategy[Any]], *, but: tuple[str, ...] = ()) -> Aspect:
    """An aspect of fields that are independent of each other, of families whose ``model_type`` is not in ``but``."""

    def aspect(own: Fields, limits: Limits) -> st.SearchStrategy[Fields]:
        del limits
        return st.just({}) if own["model_type"] in but else optional(own, choices)

    return aspect


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
