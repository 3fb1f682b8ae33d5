"""The vocabulary, shared out over the ranks: token embedding and output head."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from paritykit.engines.nano.group import Group
from paritykit.engines.nano.parameter import Build, LoadedParameter, Shard, copy_checked, narrow_checked

VOCABULARY_MULTIPLE = 64
"""As in vLLM: the vocabulary is padded to a multiple of this."""


def padded_vocabulary(size: int, ranks: int) -> int:
    """``size`` rounded up so that every rank gets the same share.

    >>> padded_vocabulary(499, 2)
    512
    """
    multiple = math.lcm(VOCABULARY_MULTIPLE, ranks)
    return -(-size // multiple) * multiple


class VocabShard:
    """The rows of the vocabulary on one rank: ``local`` from ``first`` on, of which ``real`` are no padding."""

    def __init__(self, vocabulary: int, group: Group) -> None:
        self.vocabulary = vocabulary
        self.padded = padded_vocabulary(vocabulary, group.size)
        self.local = self.padded // group.size
        self.first = group.rank * self.local
        self.real = max(0, min(self.local, vocabulary - self.first))

    def load(self, parameter: LoadedParameter, tensor: torch.Tensor, shard: Shard = None) -> None:
        """Copy this rank's rows; padding rows are zero."""
        del shard
        start = min(self.first, self.vocabulary)
        own = narrow_checked(tensor, 0, start, self.real, total=self.vocabulary)
        copy_checked(parameter.data[: self.real], own)
        parameter.data[self.real :].zero_()


class VocabParallelEmbedding(nn.Module):
    """Token ids ``[tokens]`` to ``[tokens, hidden]``: every rank looks up its own rows, the sum is the whole."""

    def __init__(self, vocabulary: int, hidden: int, *, build: Build) -> None:
        super().__init__()
        self._group = build.group
        self.shard = VocabShard(vocabulary, build.group)
        self.weight = build.parameter(self.shard.local, hidden, loader=self.shard.load)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The embedding of every token, on every rank."""
        if self._group.size == 1:
            return functional.embedding(ids, self.weight)
        local = ids - self.shard.first
        mine = (local >= 0) & (local < self.shard.real)
        found = functional.embedding(local.where(mine, 0), self.weight)
        return self._group.all_reduce(found.where(mine[:, None], 0))


class ParallelHead(nn.Module):
    """``[tokens, hidden]`` to logits ``[tokens, vocabulary]``, joined over the ranks, without the padding."""

    def __init__(self, vocabulary: int, hidden: int, *, build: Build) -> None:
        super().__init__()
        self._group = build.group
        self.shard = VocabShard(vocabulary, build.group)
        self.weight = build.parameter(self.shard.local, hidden, loader=self.shard.load)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding's weight as this head's."""
        self.weight = embedding.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits, on every rank."""
        local = functional.linear(hidden, self.weight)
        return self._group.all_gather(local)[..., : self.shard.vocabulary]
