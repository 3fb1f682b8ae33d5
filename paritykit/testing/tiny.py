"""Tiny seeded Hugging Face checkpoints whose values let no mistake hide.

The usual initialisation (std 0.02, norm weights 1, biases 0) makes every layer nearly the identity and hides whole
classes of faults. Here linear layers have unit gain (those that make attention scores somewhat more), norm weights
spread by 0.5 around their default, biases are far from zero, and every parameter is drawn from a generator of its
own, seeded by (seed, parameter name).
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from huggingface_hub.errors import StrictDataclassError

from paritykit.errors import EngineMissingError, UnknownNameError, UsageError
from paritykit.testing.families import find_family, tiny_config
from paritykit.testing.folders import empty_folder, is_complete, kept_folder, no_progress_bar, publish

if TYPE_CHECKING:
    import torch

RECIPE = 1
"""Version of the way values are drawn; part of the cache key."""

DTYPES = ("float32", "float16", "bfloat16")
BIAS_STD = 0.3
NORM_BIAS_STD = 0.15
"""Smaller: through the gain of the next layer it would drown the tokens in an offset that is common to all."""
NORM_SPREAD = 0.5
ROUTER_GAIN = 2.0
"""Spreads the router's logits, so that the chosen experts' weights differ clearly."""
SCORING = {"q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "q_norm", "k_norm"}
"""Modules that get the family's sharpness as gain: those that make the attention scores (values come along)."""


def tiny_model(
    family: str, path: str | os.PathLike[str] | None = None, *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Write a tiny seeded checkpoint (config.json, safetensors, no tokenizer) and return its folder.

    ``family`` is one of ``TINY_FAMILIES``; ``overrides`` are fields of its config. With no ``path`` the folder lies
    in the Hugging Face assets cache and is reused; a given ``path`` must be absent or an empty folder. The folder
    appears whole or not at all, also when several processes ask for it at once.

    Raises UnknownNameError for an unknown family, dtype or config field, UsageError for a value that the config
    refuses or a folder that cannot be written, EngineMissingError without transformers.
    """
    if dtype not in DTYPES:
        raise UnknownNameError("tiny model dtype", dtype, DTYPES)
    config = tiny_config(family, **overrides)
    try:
        target = _cache_folder(family, config, seed, dtype) if path is None else empty_folder(path)
        if not is_complete(target):
            publish(target, lambda folder: _build(family, config, folder, seed=seed, dtype=dtype))
    except OSError as error:
        raise UsageError(f"cannot write the tiny model {family!r}: {error}") from error
    return target


def _cache_folder(family: str, config: dict[str, Any], seed: int, dtype: str) -> Path:
    try:
        recipe = [RECIPE, version("transformers"), msgspec.to_builtins(find_family(family)), seed, dtype, config]
    except PackageNotFoundError as error:
        raise EngineMissingError("tiny models need transformers: pip install 'paritykit[hf]'") from error
    return kept_folder("tiny", family, recipe)


def _build(family: str, fields: dict[str, Any], folder: Path, *, seed: int, dtype: str) -> None:
    import torch

    config = _check_fields(family, fields)
    model = _make_model(family, config)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        _fill(parameter, name, module=module, scale=_scale(family, name, module, model.config), seed=seed)
    with no_progress_bar():
        model.to(getattr(torch, dtype)).save_pretrained(folder)


def _check_fields(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` as the installed config class spells them. UnknownNameError for one that it does not have."""
    from transformers import CONFIG_MAPPING

    _check_ropes(family, fields.get("rope_parameters"))
    kind = CONFIG_MAPPING[fields["model_type"]]
    own = inspect.signature(kind).parameters
    known = {"model_type", *own, *kind.attribute_map, *find_family(family).config}
    for name in fields:
        if name not in known:
            raise UnknownNameError(f"config field of tiny model {family!r}", name, known)
    if "rope_parameters" in fields and "rope_parameters" not in own:
        return {**{k: v for k, v in fields.items() if k != "rope_parameters"}, **_split_rope(fields["rope_parameters"])}
    return fields


def _check_ropes(family: str, ropes: Any) -> None:
    """UnknownNameError for a kind of rotary embedding that transformers does not have."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = {"default", *ROPE_INIT_FUNCTIONS}
    for rope in (ropes, *ropes.values()) if isinstance(ropes, dict) else ():
        kind = str(rope.get("rope_type", "default")) if isinstance(rope, dict) else "default"
        if kind not in known:
            raise UnknownNameError(f"rope_type of tiny model {family!r}", kind, known)


def _make_model(family: str, fields: dict[str, Any]) -> Any:
    """The model with values that do not matter; torch's global random state stays as it was.

    It is tried on one token: some sizes that do not fit each other show only there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
            model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        return model
    except (StrictDataclassError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"tiny model {family!r}: its config cannot be built: {error}") from error


def _split_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` in the fields that transformers 4 has for it."""
    if "full_attention" in rope:
        return {**_split_rope(rope["full_attention"]), "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}),
        "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
    }


def _scale(family: str, name: str, module: torch.nn.Module, config: Any) -> float:
    """Gain of a layer, or for an embedding its std."""
    import torch

    found = find_family(family)
    own_name = name.split(".")[-2]
    if isinstance(module, torch.nn.Embedding):
        return _embedding_std(config.hidden_size, scaled=found.embedding_scaled, tied=config.tie_word_embeddings)
    if own_name == "gate":
        return ROUTER_GAIN
    return found.sharpness if own_name in SCORING else 1.0


def _embedding_std(hidden: int, *, scaled: bool, tied: bool) -> float:
    """1, or smaller where the embedding is the head too: a model that repeats its input hides what its layers do."""
    if scaled:
        return 0.5 * math.pow(hidden, -0.5)
    return math.pow(hidden, -0.25) if tied else 1.0


def _fill(parameter: torch.Tensor, name: str, *, module: torch.nn.Module, scale: float, seed: int) -> None:
    """Overwrite ``parameter`` in place with values that depend on ``seed``, its name, shape and module alone."""
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]))
    with torch.no_grad():
        if name.endswith("bias"):
            std = NORM_BIAS_STD if isinstance(module, torch.nn.LayerNorm) else BIAS_STD
            parameter.normal_(0.0, std, generator=generator)
        elif parameter.ndim == 1:
            middle = float(parameter.mean()) + scale - 1.0
            parameter.uniform_(middle - NORM_SPREAD, middle + NORM_SPREAD, generator=generator)
        elif isinstance(module, torch.nn.Embedding):
            parameter.normal_(0.0, scale, generator=generator)
        else:
            fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter.shape[-1]
            parameter.normal_(0.0, scale * fan_in**-0.5, generator=generator)
