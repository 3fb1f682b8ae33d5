"""Mistakes in a checkpoint's files: what a damaged or badly converted one looks like."""

from __future__ import annotations

import torch

from paritykit.testing.faults import needs
from paritykit.testing.faults.folder import WEIGHTS, Copy
from paritykit.testing.faults.table import fault

LAYER = "model.layers.{layer}"
FILES = {"kind": "checkpoint", "stage": "checkpoint", "checks": ("checkpoint",), "point": ""}
VALUES = {"kind": "checkpoint", "stage": "checkpoint", "checks": ("modules", "logits")}


@fault("file-key-missing", cause="weight-not-loaded", seen=("SGLang #16235",), needs=(needs.DENSE,), **FILES)
def key_missing(copy: Copy) -> None:
    """One tensor was lost when the checkpoint was converted."""
    tensors = copy.tensors
    del tensors[copy.own("mlp.up_proj.weight")]
    copy.write(tensors)


@fault("file-second-value", cause="weight-corrupt", seen=("vLLM #5005", "vLLM #33491"), **FILES)
def second_value(copy: Copy) -> None:
    """A second file, as from another export, holds one of the tensors with another value."""
    name = copy.own("self_attn.o_proj.weight")
    copy.write({name: copy.tensors[name] * 1.5}, file="other.safetensors")


@fault("file-truncated", cause="weight-corrupt", seen=("vLLM #53537",), **FILES)
def truncated(copy: Copy) -> None:
    """The file of weights ends early: the transfer broke off."""
    file = copy.path / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


@fault("file-nonfinite", cause="weight-corrupt", seen=("vLLM #53537",), **FILES)
def nonfinite(copy: Copy) -> None:
    """A weight holds a number that is none: bytes were damaged on the way."""
    tensors = copy.tensors
    tensors[copy.own("self_attn.o_proj.weight")][3, 5] = float("nan")
    copy.write(tensors)


@fault("file-keys-renamed", cause="weight-not-loaded", seen=("TGI #2365", "vLLM #19151"), **FILES)
def renamed(copy: Copy) -> None:
    """A norm has the name that another size of the family gives it."""
    names = {copy.own("input_layernorm.weight"): copy.own("ln_attn.weight")}
    copy.write({names.get(name, name): tensor for name, tensor in copy.tensors.items()})


@fault("file-vocabulary-cut", cause="vocab-shard", seen=("litgpt #1334",), **FILES)
def vocabulary_cut(copy: Copy) -> None:
    """The vocabulary's tensors have fewer rows than the config says."""
    rows = copy.config["vocab_size"] - 3
    names = ("model.embed_tokens.weight", "lm_head.weight")
    copy.write({name: t[:rows] if name in names else t for name, t in copy.tensors.items()})


@fault("file-layers-too-many", cause="weight-not-loaded", seen=("SGLang #16235", "vLLM #10327"), **FILES)
def layers_too_many(copy: Copy) -> None:
    """The config speaks of more layers than there are weights for."""
    config = copy.config
    types = config.get("layer_types")
    more = {"layer_types": [*types, types[-1]]} if types else {}
    copy.set(num_hidden_layers=config["num_hidden_layers"] + 1, **more)


@fault("file-head-missing", cause="lm-head", seen=("TGI #953", "vLLM #25454"), needs=(needs.UNTIED,), **FILES)
def head_missing(copy: Copy) -> None:
    """The config says that the head is untied, and there is none."""
    tensors = copy.tensors
    del tensors["lm_head.weight"]
    copy.write(tensors)


@fault("file-bytes-flipped", cause="weight-corrupt", seen=("vLLM #53537",), point=f"{LAYER}.self_attn.o_proj", **VALUES)
def flipped(copy: Copy) -> None:
    """A few bytes of a weight were flipped on the way: the header is good, the values are not."""
    tensors = copy.tensors
    row = tensors[copy.own("self_attn.o_proj.weight")][3]
    row.copy_((row.view(torch.int32) ^ (1 << 23)).view(row.dtype))
    copy.write(tensors)


@fault(
    "config-rope-theta",
    cause="rope-theta",
    seen=("TGI #2212", "vLLM #6693"),
    point="model.layers.0.self_attn",
    needs=(needs.PLAIN_ROPE,),
    **VALUES,
)
def config_theta(copy: Copy) -> None:
    """The config that was saved has another rotary base than the model was trained with."""

    def doubled(rope: dict[str, object]) -> dict[str, object]:
        return {k: v * 2 if k == "rope_theta" and isinstance(v, float | int) else v for k, v in rope.items()}

    rope = copy.config.get("rope_parameters") or {"rope_theta": copy.config.get("rope_theta")}
    nested = any(isinstance(v, dict) for v in rope.values())
    copy.set(rope_parameters={k: doubled(v) for k, v in rope.items()} if nested else doubled(rope))


@fault(
    "config-norm-eps",
    cause="norm-eps",
    seen=("SGLang #9884",),
    point="model.layers.0.input_layernorm",
    needs=(needs.OWN_EPS,),
    **VALUES,
)
def config_eps(copy: Copy) -> None:
    """The config that was saved has another norm epsilon than the model was trained with."""
    copy.set(rms_norm_eps=needs.DEFAULT_EPS)


@fault(
    "config-tied",
    cause="weight-shared-wrongly",
    seen=("vLLM #33359", "SGLang #18024"),
    point="lm_head",
    needs=(needs.UNTIED,),
    **VALUES,
)
def config_tied(copy: Copy) -> None:
    """The config that was saved ties a head that is not tied."""
    copy.set(tie_word_embeddings=True)


@fault(
    "config-softcap-missing", cause="softcap", point="model.layers.0.self_attn", needs=(needs.ATTENTION_CAP,), **VALUES
)
def config_softcap(copy: Copy) -> None:
    """The config that was saved has lost the cap on attention scores."""
    copy.set(attn_logit_softcapping=None)


@fault(
    "config-window-missing",
    cause="sliding-window",
    seen=("vLLM #18693", "vLLM #33521"),
    point="model.layers.0.self_attn",
    needs=(needs.WINDOW,),
    **VALUES,
)
def config_window(copy: Copy) -> None:
    """The config that was saved has lost the layers' types: all see all of the past."""
    config = copy.config
    types = ["full_attention"] * config["num_hidden_layers"]
    copy.set(**({"layer_types": types} if "layer_types" in config else {"sliding_window": None}))
