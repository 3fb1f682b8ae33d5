"""Trained Llama weights in the checkpoint of another family that computes the same function.

Only families that can do so exactly are here, with weights that bfloat16 still holds: rows are moved, fused, repeated
or scaled by a power of two, zeros are added. Qwen3, OLMo 2 and Gemma 3 are not: they normalise queries and keys, whose
lengths a Llama uses, and no weight of the norm gives a length back that differs from token to token. Nor is Gemma: it
adds one to a norm's weight, and ``w - 1`` is not a bfloat16 number; vLLM has it with no other activation than GELU.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paritykit.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
EXPERTS = 4
ROUTER_GAIN = 2.0
"""Spreads the router's logits, as in the tiny models: which experts a token gets is no toss-up."""
SCALES = {"embedding_multiplier": 0.5, "logits_scaling": 2.0, "residual_multiplier": 2.0}
"""Powers of two, so that weights divided by them are exact in every dtype."""
SCORE_SCALE = 0.25
"""What Granite's attention multiplier is, in units of the usual ``head_dim ** -0.5``."""
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Config fields that mean the same in all these families."""
WEIGHTS = "model.safetensors"
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _keep(tensors: Tensors, _: Mapping[str, Any]) -> Tensors:
    return tensors


def _add_zero_biases(tensors: Tensors, _: Mapping[str, Any]) -> Tensors:
    """Biases of q, k and v, all zero."""
    import torch

    added = {
        name.removesuffix("weight") + "bias": torch.zeros(weight.shape[0], dtype=weight.dtype)
        for name, weight in tensors.items()
        if re.search(r"\.[qkv]_proj\.weight$", name)
    }
    return {**tensors, **added}


def _fuse(tensors: Tensors, _: Mapping[str, Any]) -> Tensors:
    """The rows of q, k and v as one linear, those of gate and up as another."""
    import torch

    found = dict(tensors)
    for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        for first in [name for name in tensors if f".{parts[0]}." in name]:
            rows = [found.pop(first.replace(parts[0], part)) for part in parts]
            found[first.replace(parts[0], fused)] = torch.cat(rows)
    return found


def _cancel_scales(tensors: Tensors, _: Mapping[str, Any]) -> Tensors:
    """Weights divided by what the config multiplies with; a head of its own as one that is tied to the embedding."""
    factors = {
        "embed_tokens": 1 / SCALES["embedding_multiplier"],
        "lm_head": SCALES["logits_scaling"],
        "q_proj": 1 / SCORE_SCALE,
        "o_proj": 1 / SCALES["residual_multiplier"],
        "down_proj": 1 / SCALES["residual_multiplier"],
    }
    return {name: weight * factors.get(name.split(".")[-2], 1.0) for name, weight in tensors.items()}


def _repeat_experts(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Every expert is the MLP, and so is the sum of those that a token gets, since their shares add up to one."""
    found = {name: weight for name, weight in tensors.items() if ".mlp." not in name}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        found[f"{block}.gate.weight"] = _router(layer, config, like=tensors["model.norm.weight"])
        for expert in range(EXPERTS):
            for new, old in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                weight = tensors[f"model.layers.{layer}.mlp.{old}.weight"]
                found[f"{block}.experts.{expert}.{new}.weight"] = weight.clone()
    return found


def _router(layer: int, config: Mapping[str, Any], *, like: Tensor) -> Tensor:
    import torch

    shape, generator = (EXPERTS, config["hidden_size"]), torch.Generator().manual_seed(layer)
    gate: Tensor = torch.randn(shape, generator=generator) * ROUTER_GAIN * shape[1] ** -0.5
    return gate.to(like.dtype)


def _interleave(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Rows of q and k in the order of a rotary embedding that turns neighbours, where Llama's turns halves."""
    size = head_size(config)

    def moved(weight: Tensor) -> Tensor:
        return weight.view(-1, 2, size // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    return {n: moved(w) if re.search(r"\.[qk]_proj\.weight$", n) else w for n, w in tensors.items()}


@dataclass(frozen=True)
class Transplant:
    """A family: its ``model_type``, what becomes of the weights, and config fields of its own."""

    model_type: str
    rewrite: Callable[[Tensors, Mapping[str, Any]], Tensors] = _keep
    fields: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda _: {})


FAMILIES: dict[str, Transplant] = {
    "llama": Transplant("llama"),
    "mistral": Transplant("mistral", fields=lambda _: {"sliding_window": None}),
    "qwen2": Transplant("qwen2", _add_zero_biases),
    "phi3": Transplant("phi3", _fuse, lambda c: {"original_max_position_embeddings": c["max_position_embeddings"]}),
    "granite": Transplant(
        "granite", _cancel_scales, lambda c: {**SCALES, "attention_multiplier": SCORE_SCALE * head_size(c) ** -0.5}
    ),
    "mixtral": Transplant(
        "mixtral", _repeat_experts, lambda _: {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    ),
    "ernie4_5": Transplant("ernie4_5", _interleave),
    "smollm3": Transplant("smollm3", fields=lambda c: {"no_rope_layers": [1] * c["num_hidden_layers"]}),
}
TRANSPLANTS: tuple[str, ...] = tuple(name for name in FAMILIES if name != "llama")
"""Families that can have a Llama's weights."""


def head_size(config: Mapping[str, Any]) -> int:
    """Features of one head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def transplant(source: Path, family: str, target: Path, *, num_hidden_layers: int | None = None) -> None:
    """Write what the Llama checkpoint ``source`` computes as a checkpoint of ``family``, ``llama`` too, to ``target``.

    ``num_hidden_layers``: only so many of its layers. All other files are taken along. Raises UnknownNameError for
    another family, UsageError for a source that is no plain Llama in one file, a family that cannot have heads of that
    size, or more layers than there are.
    """
    config, kind = _cut_config(source, num_hidden_layers), find_transplant(family)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    _put_config(config, family, target)
    wanted = config["num_hidden_layers"]
    tensors = {name: weight for name, weight in _read_weights(source).items() if _layer(name) < wanted}
    _write_weights(kind.rewrite(tensors, config), target)


def transplanted_config(source: Path, family: str, *, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """The config that ``transplant`` writes, without its weights. Raises as ``transplant`` does."""
    config = _cut_config(source, num_hidden_layers)
    with tempfile.TemporaryDirectory(prefix="paritykit-") as folder:
        _put_config(config, family, Path(folder))
        found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return found


def find_transplant(family: str) -> Transplant:
    """The family of that name. Raises UnknownNameError with the nearest names."""
    if family not in FAMILIES:
        raise UnknownNameError("family for the weights of a Llama", family, FAMILIES)
    return FAMILIES[family]


def _layer(name: str) -> int:
    found = LAYER.match(name)
    return int(found[1]) if found else -1


def _cut_config(source: Path, num_hidden_layers: int | None) -> dict[str, Any]:
    """The config of the Llama with so many layers."""
    config = _read_config(source)
    wanted = num_hidden_layers or config["num_hidden_layers"]
    if not 0 < wanted <= config["num_hidden_layers"]:
        raise UsageError(f"{source} has {config['num_hidden_layers']} layers, not {wanted}")
    return {**config, "num_hidden_layers": wanted}


def _put_config(config: dict[str, Any], family: str, target: Path) -> None:
    if family == "llama":
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        _write_config(config, find_transplant(family), target)


def _read_config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama" or not (source / WEIGHTS).is_file():
        raise UsageError(f"{source} is not a Llama checkpoint with its weights in {WEIGHTS}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UsageError(f"{source} has biases, which not every family can take")
    return config


def _write_config(config: Mapping[str, Any], kind: Transplant, target: Path) -> None:
    """A config that its own class wrote, so that it is as a checkpoint of this family has it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = CONFIG_MAPPING[kind.model_type]
    fields = {name: config[name] for name in CARRIED if name in config}
    if "head_dim" in inspect.signature(made).parameters:
        fields["head_dim"] = head_size(config)
    elif head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise UsageError(f"{kind.model_type} has no head_dim of its own, and {head_size(config)} needs one")
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.model_type]
    named = {"architectures": [architecture], "dtype": config.get("dtype") or config.get("torch_dtype")}
    made(**{**fields, **named, **kind.fields(config)}).save_pretrained(target)


def _read_weights(source: Path) -> Tensors:
    from safetensors.torch import load_file

    return dict(load_file(source / WEIGHTS))


def _write_weights(tensors: Tensors, target: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: w.contiguous() for n, w in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
