"""Linear layers whose weights are shared out over the ranks: by columns of their output, or rows of their input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from paritykit.engines.nano.parameter import Build, LoadedParameter, Shard, copy_checked, load_whole, narrow_checked


@dataclass(frozen=True)
class Part:
    """One part of a fused output: columns in all, on this rank, and how many ranks hold the same ones."""

    total: int
    local: int
    replicas: int = 1


class ReplicatedLinear(nn.Module):
    """``[tokens, inputs]`` to ``[tokens, outputs]``, whole on every rank."""

    def __init__(self, inputs: int, outputs: int, *, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter(outputs, inputs, loader=load_whole)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` times the weight."""
        return functional.linear(x, self.weight)


class ColumnParallelLinear(nn.Module):
    """``[tokens, inputs]`` to this rank's columns of every part, one part after the other.

    ``parts`` maps a shard id, as the weight loader gets it, to its sizes.
    """

    def __init__(self, inputs: int, parts: Mapping[Shard, Part], *, bias: bool, build: Build) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.widths = [p.local for p in parts.values()]
        """Columns of each part on this rank."""
        self._rank = build.group.rank
        width = sum(self.widths)
        self.weight = build.parameter(width, inputs, loader=self.load)
        self.bias = build.parameter(width, loader=self.load) if bias else None

    def load(self, parameter: LoadedParameter, tensor: torch.Tensor, shard: Shard = None) -> None:
        """Copy this rank's rows of part ``shard`` to their place."""
        part, ids = self.parts[shard], list(self.parts)
        start = sum(self.parts[i].local for i in ids[: ids.index(shard)])
        own = narrow_checked(tensor, 0, self.source_start(part), part.local, total=part.total)
        copy_checked(parameter.data.narrow(0, start, part.local), own)

    def source_start(self, part: Part) -> int:
        """Where this rank's rows of a part begin in the checkpoint; replicas begin at the same place."""
        return self._rank // part.replicas * part.local

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's columns."""
        return functional.linear(x, self.weight, self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several projections of one input, each shared out evenly; their shard ids are 0, 1, ..."""

    def __init__(self, inputs: int, outputs: Sequence[int], *, bias: bool, build: Build) -> None:
        parts: dict[Shard, Part] = {n: Part(total, total // build.group.size) for n, total in enumerate(outputs)}
        super().__init__(inputs, parts, bias=bias, build=build)


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values; where there are more ranks than kv heads, several ranks hold the same head."""

    def __init__(self, inputs: int, head_dim: int, heads: int, kv_heads: int, *, bias: bool, build: Build) -> None:
        size = build.group.size
        replicas = max(1, size // kv_heads)
        self.heads, self.kv_heads = heads // size, kv_heads * replicas // size
        kv = Part(kv_heads * head_dim, self.kv_heads * head_dim, replicas)
        parts: dict[Shard, Part] = {"q": Part(heads * head_dim, self.heads * head_dim), "k": kv, "v": kv}
        super().__init__(inputs, parts, bias=bias, build=build)


class RowParallelLinear(nn.Module):
    """This rank's columns of the input, ``[tokens, inputs / ranks]``, to the whole ``[tokens, outputs]``."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, build: Build) -> None:
        super().__init__()
        self._group = build.group
        self._inputs = inputs
        self.weight = build.parameter(outputs, inputs // build.group.size, loader=self.load)
        self.bias = build.parameter(outputs, loader=load_whole) if bias else None

    def load(self, parameter: LoadedParameter, tensor: torch.Tensor, shard: Shard = None) -> None:
        """Copy this rank's columns."""
        del shard
        local = parameter.shape[1]
        copy_checked(parameter.data, narrow_checked(tensor, 1, self._group.rank * local, local, total=self._inputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; the bias is added once, after it."""
        total = self._group.all_reduce(functional.linear(x, self.weight))
        return total if self.bias is None else total + self.bias
