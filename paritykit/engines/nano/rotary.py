"""Rotary position embedding: frequencies of every kind, and the rotation of queries and keys.

Formulas: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), YaRN with its NTK-aware forerunners
(2309.00071), Llama 3.1's reference code. All in float32, as transformers has it: at position 1000 one rounding of a
frequency is already an angle of 1e-4.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from paritykit.engines.nano.rope import Rope
from paritykit.engines.nano.step import Step


def frequencies(rope: Rope, length: int = 0) -> torch.Tensor:
    """Angle per position of every pair, float32 ``[dim / 2]``; only ``dynamic`` looks at the sequence's ``length``."""
    if rope.kind == "dynamic":
        return plain_frequencies(stretched_theta(rope, length), rope.dim)
    plain = plain_frequencies(rope.theta, rope.dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return llama3_frequencies(rope, plain)
    return yarn_frequencies(rope) if rope.kind == "yarn" else plain


def plain_frequencies(theta: float, dim: int) -> torch.Tensor:
    """``theta ** (-2 i / dim)`` for every pair ``i``."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def stretched_theta(rope: Rope, length: int) -> float:
    """The base of dynamic NTK scaling: grows once a sequence is longer than the model was trained for."""
    stretch = rope.factor * max(length, rope.original) / rope.original - (rope.factor - 1)
    return float(rope.theta * stretch ** (rope.dim / (rope.dim - 2)))


def llama3_frequencies(rope: Rope, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those between blended by how often they fit the original length."""
    wave = 2 * math.pi / plain
    stretched = torch.where(wave > rope.original / rope.low, plain / rope.factor, plain)
    share = (rope.original / wave - rope.low) / (rope.high - rope.low)
    blended = (1 - share) * stretched / rope.factor + share * stretched
    between = (wave >= rope.original / rope.high) & (wave <= rope.original / rope.low)
    return torch.where(between, blended, stretched)


def yarn_frequencies(rope: Rope) -> torch.Tensor:
    """Pairs that turn often within the original length are kept, those that turn rarely stretched, a ramp between."""

    def pair_turning(turns: float) -> float:
        return rope.dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    wave = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    return 1.0 / (rope.factor * wave) * (1 - kept) + 1.0 / wave * kept


class Rotary(nn.Module):
    """Rotates queries and keys. One object serves all layers of its kind; cos and sin are made once a step."""

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.rope = rope
        self._frequencies = frequencies(rope)

    def forward(self, query: torch.Tensor, key: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated ``query`` and ``key``, ``[tokens, heads, head_dim]`` each."""
        cos, sin = step.once(self, lambda: tuple(t.to(query.dtype) for t in self.table(step.positions, step.lengths)))
        both = self.rotate(torch.cat((query, key), dim=1), cos, sin)
        return both[:, : query.shape[1]], both[:, query.shape[1] :]

    def table(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 ``[tokens, 1, dim]``, of positions in sequences of ``lengths``, both ``[tokens]``."""
        angle = positions.to(torch.float32)[:, None] * self._rows(lengths)
        angle = angle.repeat_interleave(2, dim=-1) if self.rope.interleaved else torch.cat((angle, angle), dim=-1)
        scale = self.rope.attention_factor
        return (angle.cos() * scale)[:, None], (angle.sin() * scale)[:, None]

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The first ``dim`` elements of each head of ``x``, ``[tokens, heads, head_dim]``, rotated; the rest as is."""
        dim = self.rope.dim
        if dim < x.shape[-1]:
            return torch.cat((self.rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
        return x * cos + self.quarter_turn(x) * sin

    def quarter_turn(self, x: torch.Tensor) -> torch.Tensor:
        """Every pair (a, b) as (-b, a); pairs are neighbours, or an element of each half."""
        if self.rope.interleaved:
            return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def _rows(self, lengths: torch.Tensor) -> torch.Tensor:
        """Frequencies ``[tokens or 1, dim / 2]``."""
        plain = self._frequencies.to(lengths.device)[None]
        if self.rope.kind != "dynamic" or not self.rope.grows(int(lengths.max())):
            return plain
        known = {length: frequencies(self.rope, length) for length in set(lengths.tolist())}
        return torch.stack([known[length] for length in lengths.tolist()]).to(lengths.device)
