"""Parameters that know how a checkpoint tensor goes into them, on this rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from paritykit.engines.nano.group import Group
from paritykit.engines.nano.stage import Stage
from paritykit.errors import EngineError

Shard = str | int | tuple[int, str] | None
"""Which part of a fused parameter a checkpoint tensor is: ``q``, 1 (up), (3, "w2") (of expert 3); None for all."""
WeightLoader = Callable[["LoadedParameter", torch.Tensor, Shard], None]


class LoadedParameter(nn.Parameter):
    """A parameter with its own ``weight_loader(parameter, tensor, shard)``, as in vLLM."""

    weight_loader: WeightLoader


@dataclass(frozen=True)
class Build:
    """What every layer needs to be built: the ranks that share it, the dtype, the device, the stage of the pipeline."""

    group: Group
    dtype: torch.dtype
    device: torch.device
    stage: Stage = field(default_factory=Stage)

    def parameter(self, *shape: int, loader: WeightLoader) -> LoadedParameter:
        """An empty parameter: NaN, so that what was never loaded shows."""
        data = torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)
        parameter = LoadedParameter(data, requires_grad=False)
        parameter.weight_loader = loader
        return parameter


def load_whole(parameter: LoadedParameter, tensor: torch.Tensor, shard: Shard = None) -> None:
    """The loader of parameters that every rank holds whole."""
    del shard
    copy_checked(parameter.data, tensor)


def copy_checked(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy, with an EngineError where the shapes differ instead of a broadcast."""
    if target.shape != source.shape:
        raise EngineError(f"has shape {list(source.shape)} where {list(target.shape)} is needed")
    target.copy_(source)


def narrow_checked(tensor: torch.Tensor, dim: int, start: int, length: int, *, total: int) -> torch.Tensor:
    """``tensor.narrow``, with an EngineError unless that axis has ``total`` elements."""
    if tensor.dim() <= dim or tensor.shape[dim] != total:
        raise EngineError(f"has shape {list(tensor.shape)} where axis {dim} needs {total}")
    return tensor.narrow(dim, start, length)
