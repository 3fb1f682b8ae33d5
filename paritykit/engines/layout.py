"""What transformers makes of a checkpoint, without its weights: the model is built on torch's meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.derived import derived_functions
from paritykit.engines.features import feature_axes, parameter_names
from paritykit.engines.hf import quiet
from paritykit.ledger.subject import ReferenceLayout


def bare_model(folder: str) -> Any:
    """The model of a checkpoint on the meta device, without a number; raises whatever its own code does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def reference_layout(folder: str) -> ReferenceLayout | None:
    """Where transformers puts each tensor of a checkpoint, and which axis is its output; None if it cannot build it."""
    checkpoint = Checkpoint(Path(folder))
    try:
        model = bare_model(folder)
    except Exception:  # a config class may refuse its own fields with any error
        return None
    names = list(checkpoint.tensors)
    own = model.state_dict()
    used = {t: p for t, p in parameter_names(model, names).items() if p in own}
    features = feature_axes(model, used)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    embedding = _weight_of(model, model.get_input_embeddings(), used)
    head = _weight_of(model, model.get_output_embeddings(), used)
    lookups = [t for t, p in used.items() if isinstance(model.get_submodule(p.rpartition(".")[0]), nn.Embedding)]
    functions = derived_functions(model)
    return ReferenceLayout(
        parameters=used,
        features=features,
        lookups=lookups,
        derived={t: functions[p] for t, p in used.items() if p in functions},
        tied=tied,
        embedding=embedding,
        head=head,
    )


def _weight_of(model: nn.Module, module: nn.Module | None, used: dict[str, str]) -> str:
    """The checkpoint's name for a module's weight, by the reference's own where the checkpoint lacks it."""
    path = next((n for n, m in model.named_modules(remove_duplicate=False) if m is module), "") if module else ""
    if not path:
        return ""
    return next((t for t, p in used.items() if p == f"{path}.weight"), f"{path}.weight")
