"""What a model must have for a fault to be plantable in it, in words and as a question to its config. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.stage import share_layers


@dataclass(frozen=True)
class Need:
    """``fits(model, layer)`` says whether the model has it, in that layer where it is a matter of layers."""

    words: str
    fits: Callable[[NanoConfig, int], bool]


DEFAULT_EPS = 1e-6

BIAS = Need("biases of q, k and v", lambda m, _: m.qkv_bias)
NO_BIAS = Need("no biases of q, k and v", lambda m, _: not m.qkv_bias)
OUTPUT_BIAS = Need("a bias of the attention's output", lambda m, _: m.output_bias)
WINDOW = Need("a sliding window in the layer", lambda m, n: m.layers[n].window is not None)
NO_WINDOW = Need("full attention in the layer", lambda m, n: m.layers[n].window is None)
ATTENTION_CAP = Need("a softcap of attention scores", lambda m, _: m.attention_softcap is not None)
NO_ATTENTION_CAP = Need("no softcap of attention scores", lambda m, _: m.attention_softcap is None)
FINAL_CAP = Need("a softcap of logits", lambda m, _: m.final_softcap is not None)
NO_FINAL_CAP = Need("no softcap of logits", lambda m, _: m.final_softcap is None)
OWN_SCALE = Need(
    "an attention scale that is not head_dim ** -0.5", lambda m, _: abs(m.scale - m.head_dim**-0.5) > 1e-3 * m.scale
)
EXPERTS = Need("experts in the layer", lambda m, n: m.layers[n].sparse)
DENSE = Need("a dense MLP in the layer", lambda m, n: not m.layers[n].sparse)
QK_NORM = Need("norms of q and k", lambda m, _: m.architecture.qk_norm)
OFFSET = Need("norm weights that are added to 1", lambda m, _: m.architecture.norm_offset != 0)
SANDWICH = Need("norms after attention and MLP", lambda m, _: m.architecture.sandwich)
SCALED_EMBEDDING = Need("an embedding multiplied by sqrt(hidden)", lambda m, _: m.architecture.embedding_scaled)
GROUPED = Need("more than one kv head, shared by several heads", lambda m, _: 1 < m.kv_heads < m.heads)
ALL_HEADS = Need("as many kv heads as heads", lambda m, _: m.kv_heads == m.heads)
TIED = Need("a head tied to the embedding", lambda m, _: m.tied)
UNTIED = Need("a head of its own", lambda m, _: not m.tied)
OWN_EPS = Need("a norm epsilon other than 1e-6", lambda m, _: m.eps != DEFAULT_EPS)
SQUARE = Need("as many attention columns as hidden ones", lambda m, _: m.heads * m.head_dim == m.hidden_size)
ROPE_SCALING = Need("scaled rotary frequencies", lambda m, n: m.layers[n].rope.kind not in ("default", "dynamic"))
PLAIN_ROPE = Need("plain rotary frequencies", lambda m, n: m.layers[n].rope.kind == "default")
TWO_ROPES = Need(
    "local layers with a rotary base of their own",
    lambda m, n: m.layers[n].window is not None and len({layer.rope.theta for layer in m.layers}) > 1,
)
GELU_TANH = Need("the tanh form of gelu", lambda m, _: m.activation == "gelu_pytorch_tanh")
SECOND_STAGE = Need(
    "the first layer of the second of two stages", lambda m, n: n == share_layers(len(m.layers), 2)[1].start
)
BEFORE = Need("a layer before it", lambda _, n: n > 0)
TWO_OF_EXPERTS = Need("several experts for each token", lambda m, _: m.experts is not None and m.experts.chosen > 1)
RENORMALISED = Need("experts' shares that sum to 1", lambda m, _: m.experts is not None and m.experts.renormalise)
LINEAR_ROPE = Need("rotary frequencies divided by a factor", lambda m, n: m.layers[n].rope.kind == "linear")


def final_cap(config: Any) -> float | None:
    """The softcap of logits, from nano's config or a Hugging Face one."""
    found = getattr(config, "final_softcap", None) or getattr(config, "final_logit_softcapping", None)
    return None if found is None else float(found)
