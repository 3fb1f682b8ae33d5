"""A checkpoint loaded by transformers on torch's meta device: by names and shapes alone.

No data is read and no memory is used. The loading is transformers' own: its renaming, its merging of experts, its list
of tensors that may be missing or left over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paritykit.audit.header import Tensor
from paritykit.audit.shapes import Mismatch, Shape

if TYPE_CHECKING:
    import torch


def model_class(config: Any) -> Any:
    """The class that the config's ``architectures`` name, or transformers' own choice for language models."""
    import transformers
    from transformers import AutoModelForCausalLM

    named = [getattr(transformers, a, None) for a in config.architectures or []]
    kinds = [(c, getattr(c, "config_class", None)) for c in named]
    own = [c for c, kind in kinds if isinstance(kind, type) and issubclass(type(config), kind)]
    return own[0] if own else AutoModelForCausalLM._model_mapping[type(config)]


def load(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What transformers does with ``tensors``, as fields of ``HFModel``. Raises what its model class raises."""
    import torch

    from paritykit.engines.features import parameter_names

    kind = model_class(config)
    with torch.device("meta"):
        model = kind._from_config(config)
    targets = parameter_names(model, list(tensors))
    stored = {p: n for n, p in targets.items()}
    expected = _saved_shapes(model)
    own = parameter_names(model, list(expected))
    saved = {p: n for n, p in own.items()}
    modules = {m: n for n, m in model.named_modules()}
    head, embedding = (_weight_name(modules, m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    return {
        "built": True,
        "class_name": kind.__name__,
        "head": saved.get(head, head),
        "stored_head": stored.get(head, ""),
        "embedding": saved.get(embedding, embedding),
        "stored_embedding": stored.get(embedding, ""),
        "tied": _tied(model, head, embedding),
        "norms": {stored.get(p, p): v for p, v in _norm_defaults(model).items()},
        "expected": expected,
        **_differences(model, {n: tuple(t.shape) for n, t in tensors.items()}, targets, expected, own),
    }


def _weight_name(modules: dict[Any, str], module: Any) -> str:
    return f"{modules[module]}.weight" if module in modules and hasattr(module, "weight") else ""


def _tied(model: Any, head: str, embedding: str) -> bool:
    """Whether this model, under this config, has one tensor for both; not every class heeds ``tie_word_embeddings``."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return bool(tied.get(head, head) == tied.get(embedding, embedding))


def _saved_shapes(model: Any) -> dict[str, Shape]:
    """Names and shapes as ``save_pretrained`` would write them."""
    state = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(model, state)
    except Exception:  # an older transformers, or a conversion that needs data
        state = model.state_dict()
    return {n: tuple(t.shape) for n, t in state.items()}


def _differences(
    model: Any, shapes: dict[str, Shape], targets: dict[str, str], expected: dict[str, Shape], own: dict[str, str]
) -> dict[str, Any]:
    """What is missing, left over or of another shape, in the checkpoint's names.

    ``targets`` are the parameters of the stored tensors, ``own`` those of the expected ones.
    """
    wrong, unexpected = _try_loading(model, shapes) or _compare_plainly(model, shapes, targets)
    parts = Counter(own.values())
    other = {p: n for n, p in targets.items() if parts[p] == 1}
    missing, mismatched = [], []
    for name, shape in expected.items():
        found = name if name in shapes else other.get(own[name], "")
        if own[name] not in wrong:
            continue
        if found not in shapes:
            missing.append(name)
        elif shapes[found] != shape:
            mismatched.append(Mismatch(found, shapes[found], shape))
    left = [n for n, p in targets.items() if p in unexpected or n in unexpected]
    return {"missing": missing, "mismatched": mismatched, "unexpected": left}


def _compare_plainly(model: Any, shapes: dict[str, Shape], targets: dict[str, str]) -> tuple[set[str], set[str]]:
    """For a transformers without the parts used below: names and shapes as they are."""
    state = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    stored = {t: shapes[n] for n, t in targets.items()}
    tied = getattr(model, "_tied_weights_keys", None) or []
    spared = set(tied) if model.config.get_text_config().tie_word_embeddings else set()
    return {n for n, s in state.items() if stored.get(n) != s and n not in spared}, set(stored) - set(state)


def _try_loading(model: Any, shapes: dict[str, Shape]) -> tuple[set[str], set[str]] | None:
    """Parameters that transformers would leave without their weights, and tensors it has no use for.

    None where this transformers loads in another way.
    """
    import torch

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig
    except ImportError:
        return None

    state = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    wanted = LoadStateDictConfig(
        device_map={"": "meta"}, ignore_mismatched_sizes=True, weight_mapping=get_model_conversion_mapping(model)
    )
    info, _ = model._load_pretrained_model(model, state, None, wanted)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    wrong = {*info.missing_keys, *(m[0] for m in info.mismatched_keys), *info.conversion_errors}
    return wrong, set(info.unexpected_keys)


def _norm_defaults(model: Any) -> dict[str, float]:
    """The value an untrained norm of each kind has: 1 for most, 0 where the model itself adds 1."""
    found: dict[type, float | None] = {}
    values: dict[str, float] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in type(module).__name__.lower() or weight is None or weight.ndim != 1:
            continue
        kind = type(module)
        if kind not in found:
            found[kind] = _untrained(kind)
        if (value := found[kind]) is not None:
            values[f"{name}.weight"] = value
    return values


def _untrained(kind: type[torch.nn.Module]) -> float | None:
    import torch

    try:
        with torch.device("cpu"):
            weight = kind(4).weight
        return float(weight.float().mean()) if isinstance(weight, torch.Tensor) else None
    except Exception:  # its arguments are of another form
        return None
