"""Weights of a drawn model: unit gain, spread norms, biases far from zero; what a class sets in its own way is kept."""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any

from paritykit.testing.tiny import BIAS_STD, NORM_SPREAD, ROUTER_GAIN

if TYPE_CHECKING:
    import torch

SHARPNESS = 1.5
"""Gain of what makes the attention scores: see ``testing.families``."""
SCORING = re.compile(r"(^|_)(q|k|qk|qkv|query|key|c_attn|wqkv)(_|$)", re.IGNORECASE)
ROUTER = re.compile(r"gate|router", re.IGNORECASE)
EMBEDDED, EMBEDDED_TIED = 1.0, 0.4
"""Root mean square of what goes into the first layer; less where the embedding is the head too."""
JITTER = 0.1
"""How much a value that a class sets in its own way is changed, of itself."""
SMALL_BIAS = 0.1
"""Std of a bias that is no parameter: such are added to a router's scores, which lie between 0 and 1."""
CENTRED = 0.25
"""A mean above so many standard deviations is no accident in a thousand values and more: the class meant it."""


def fill_model(model: Any, *, seed: int) -> None:
    """Overwrite every weight of ``model``, in place, with values that depend on ``seed`` and its name alone."""
    experts = expert_counts(model.config)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        _fill(parameter, name, owner=owner, seed=seed, experts=experts)
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in kept and buffer.is_floating_point() and name.endswith("bias"):
            buffer.add_(buffer.new_empty(buffer.shape).normal_(0.0, SMALL_BIAS, generator=_generator(seed, name)))
    _scale_embedding(model)


def expert_counts(config: Any) -> set[int]:
    """The numbers of experts that a config names."""
    text = config.get_text_config(decoder=True)
    return {v for n, v in vars(text).items() if "expert" in n and type(v) is int and v > 1}


def _generator(seed: int, name: str) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]))


def _fill(parameter: torch.Tensor, name: str, *, owner: Any, seed: int, experts: set[int]) -> None:
    import torch

    generator, own = _generator(seed, name), parameter.detach().clone()
    noise = torch.empty_like(own).normal_(generator=generator)
    if isinstance(owner, torch.nn.Embedding) or (type(owner).__name__.endswith("Embedding") and own.ndim == 2):
        parameter.copy_(noise)
    elif _is_set(own):
        parameter.copy_(own * (1 + JITTER * noise.clamp(-2, 2)))
    elif own.ndim < 2 or (_is_constant(own) and float(own.flatten()[0])):
        parameter.copy_(_spread(own, noise, name=name, generator=generator))
    elif name.endswith("bias"):
        parameter.copy_(BIAS_STD * noise)
    else:
        parameter.copy_(noise * _gain(name, own, experts) / math.sqrt(_fan_in(own, owner)))


def _is_constant(own: torch.Tensor) -> bool:
    return bool((own == own.flatten()[0]).all()) if own.numel() else True


def _is_set(own: torch.Tensor) -> bool:
    """Whether a class gave values of its own: of several kinds, and not drawn around zero."""
    if own.numel() < 2 or not bool(own.isfinite().all()) or _is_constant(own):
        return False
    values = own.double()
    if own.ndim < 2:
        return True
    return abs(float(values.mean())) > CENTRED * float(values.std())


def _spread(own: torch.Tensor, noise: torch.Tensor, *, name: str, generator: torch.Generator) -> torch.Tensor:
    """A constant, with something added to each element."""
    middle = own.nan_to_num(0.0, 0.0, 0.0)
    if name.endswith("bias"):
        return middle + BIAS_STD * noise
    return middle + noise.uniform_(-NORM_SPREAD, NORM_SPREAD, generator=generator)


def _gain(name: str, own: torch.Tensor, experts: set[int]) -> float:
    own_name = name.split(".")[-2]
    if ROUTER.search(own_name) and own.ndim == 2 and own.shape[0] in experts:
        return ROUTER_GAIN
    return SHARPNESS if SCORING.search(own_name) else 1.0


def _fan_in(own: torch.Tensor, owner: Any) -> int:
    if type(owner).__name__ == "Conv1D":
        return own.shape[0]
    return math.prod(own.shape[1:]) if "Conv" in type(owner).__name__ else own.shape[-1]


def _scale_embedding(model: Any) -> None:
    """Scale the embedding so that what goes into the first layer has the wanted size, whatever multiplies it."""
    import torch

    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(table, "weight", head)
    tokens = torch.arange(min(64, table.weight.shape[0]))[None]
    states = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    if not states:
        return
    size = float(states[0].float().pow(2).mean().sqrt())
    if size > 0:
        table.weight.mul_((EMBEDDED_TIED if tied else EMBEDDED) / size)
