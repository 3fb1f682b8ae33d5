"""Fields of a config that are drawn, and what the families have in their place."""

from __future__ import annotations

from collections.abc import Mapping
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
    "gemma3_text": {"attention_bias": False, "final_logit_softcapping": None},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "gpt2": {"activation_function": "gelu_new", "tie_word_embeddings": True},
    "opt": {"enable_bias": True, "tie_word_embeddings": True},
}
"""Fields of which the tiny families say nothing, as the config classes have them, by ``model_type``."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the models must keep to: see ``models``."""

    head_dims: tuple[int, ...]
    ropes: tuple[str, ...]
    ranks: int = 1

    def share(self, heads: int, kv_heads: int) -> bool:
        """Whether so many heads can be shared by the ranks."""
        return not heads % self.ranks and not (kv_heads % self.ranks and self.ranks % kv_heads)


def defaults(family: str) -> Fields:
    """A family's config under the usual names of its fields, with those that it leaves to the config class."""
    found = find_family(family)
    usual = {own: name for name, own in found.aliases.items()}
    config = tiny_config(family)
    return {**SILENT.get(found.model_type, {}), **{usual.get(name, name): value for name, value in config.items()}}


def optional(own: Fields | None, choices: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Fields]:
    """Some of ``choices``, of those only that are in ``own`` where it is given."""
    return st.fixed_dictionaries({}, optional={n: s for n, s in choices.items() if own is None or n in own})


def merged(*parts: st.SearchStrategy[Fields]) -> st.SearchStrategy[Fields]:
    """The fields of all parts; of a field in several, the last."""
    return st.tuples(*parts).map(lambda found: {n: v for part in found for n, v in part.items()})
