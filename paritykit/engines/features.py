"""What transformers' modules say of themselves: the parameter of each checkpoint tensor, its output axis; routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def parameter_names(model: Any, names: list[str]) -> dict[str, str]:
    """Checkpoint tensor name to parameter name, as transformers renames while loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {n: n for n in names}
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    return {n: rename_source_key(n, renamings, converters, prefix, own)[0] for n in names}


def feature_axes(model: nn.Module, parameters: Mapping[str, str]) -> dict[str, int]:
    """Checkpoint tensor to its axis of output features, for those whose module says which that is."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {t: axis for t, p in parameters.items() if p in own and (axis := feature_axis(model, p)) is not None}


def feature_axis(model: nn.Module, parameter: str) -> int | None:
    """The axis of a parameter along which its module's output features run; None where its class does not say."""
    path, _, name = parameter.rpartition(".")
    module: Any = model.get_submodule(path)
    if name == "bias":
        return 0
    if isinstance(module, nn.Linear):
        return 0
    if isinstance(module, nn.Embedding):
        return 1
    if type(module).__name__ == "Conv1D":
        return 1
    tensor = getattr(module, name, None)
    return 0 if isinstance(tensor, torch.Tensor) and tensor.dim() == 1 else None


def experts_chosen(module: nn.Module) -> int:
    """How many experts a router chooses by its largest logits; 0 for any other module, and where it chooses by more.

    Some add a bias that is not in the logits, or look at groups of experts first.
    """
    count, groups = getattr(module, "top_k", 0), getattr(module, "num_group", None) or 1
    greedy = groups == 1 or getattr(module, "topk_method", "") == "greedy"
    plain = "Router" in type(module).__name__ and not isinstance(module, nn.Linear) and isinstance(count, int)
    return count if plain and greedy and not hasattr(module, "e_score_correction_bias") else 0
