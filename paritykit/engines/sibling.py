"""A small sibling of a large checkpoint: same architecture and switches, fewer layers and experts, narrower.

Its loader's layout is learned in its place. Head counts stay, so that sharding and replication are the large model's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import EngineError
from paritykit.provenance.names import numbers, pattern

LARGE = 1 << 24
"""Elements of a checkpoint from which on a sibling is traced in its place."""
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
HEAD_DIM = 32
WIDTH = 64
VOCABULARY = 448


def is_large(checkpoint: Checkpoint) -> bool:
    """Whether tracing the checkpoint itself would take more memory than a sibling is worth."""
    return sum(math.prod(shape) for shape in checkpoint.tensors.values()) > LARGE


def make_sibling(checkpoint: Checkpoint, folder: Path, *, ranks: int = 1) -> Path:
    """Write the sibling into ``folder``, its weights of no meaning, and return it.

    Raises EngineError where transformers builds no such model, or gives its tensors other names.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from paritykit.engines.hf import quiet

    fields = sibling_config(checkpoint, ranks=ranks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, checkpoint.dtype))
            model.save_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        raise EngineError(f"no small sibling of {checkpoint.path} can be made to trace: {error}") from error
    (folder / "config.json").write_text(json.dumps(fields))
    made = {pattern(n) for n in Checkpoint(folder).tensors}
    strange = sorted({pattern(n) for n in checkpoint.tensors} ^ made)
    if strange and {pattern(n) for n in checkpoint.tensors} - made:
        raise EngineError(f"the small sibling of {checkpoint.path} has other tensors: {', '.join(strange[:3])}")
    return folder


def sibling_config(checkpoint: Checkpoint, *, ranks: int) -> dict[str, Any]:
    """The config of the sibling, as plain data."""
    config: dict[str, Any] = json.loads(json.dumps(checkpoint.config))
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    name = next((n for n in LAYERS if isinstance(text.get(n), int)), None)
    if name is not None:
        _shorten(text, name, kinds(checkpoint))
    _narrow(text, ranks)
    for key in EXPERTS:
        if isinstance(text.get(key), int):
            text[key] = min(text[key], max(8, *(text.get(k) or 0 for k in ("num_experts_per_tok", "top_k"))))
    return config


def kinds(checkpoint: Checkpoint) -> int:
    """How many layers from the first hold every kind of layer there is; kinds differ in their tensors."""
    held: dict[int, set[tuple[str, int]]] = {}
    for name, shape in checkpoint.tensors.items():
        if numbers(name):
            held.setdefault(numbers(name)[0], set()).add((pattern(name), len(shape)))
    seen: list[set[tuple[str, int]]] = []
    last = 0
    for layer in sorted(held):
        if held[layer] not in seen:
            seen.append(held[layer])
            last = layer
    return max(2, last + 1)


def _shorten(text: dict[str, Any], name: str, layers: int) -> None:
    before = text[name]
    listed = [v for v in text.values() if isinstance(v, list) and len(v) == before]
    for values in listed:  # every kind of layer that a list names is kept too
        layers = max(layers, *(values.index(v) + 1 for v in values if not isinstance(v, dict | list)), 1)
    text[name] = min(before, layers)
    for key, value in text.items():
        if isinstance(value, list) and len(value) == before:
            text[key] = value[: text[name]]


def _narrow(text: dict[str, Any], ranks: int) -> None:
    """Smaller widths; what is not known by name stays."""
    heads = next((text[k] for k in ("num_attention_heads", "n_head") if isinstance(text.get(k), int)), 1)
    if isinstance(text.get("head_dim"), int):
        text["head_dim"] = HEAD_DIM
        hidden = WIDTH * ranks
    else:
        hidden = heads * HEAD_DIM
    for key in ("hidden_size", "n_embd", "word_embed_proj_dim"):
        if isinstance(text.get(key), int):
            text[key] = hidden
    for key in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(text.get(key), int):
            text[key] = 3 * WIDTH * ranks
    if isinstance(text.get("vocab_size"), int):
        text["vocab_size"] = min(text["vocab_size"], VOCABULARY + text["vocab_size"] % 64)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if text.get(key) is not None:
            text[key] = None
