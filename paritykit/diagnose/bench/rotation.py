"""Rotary embedding, measured: what turns keys before it into keys after it, whatever the config calls it.

Two elements of a head are a complex number ``z``, and rotation multiplies it by ``m * exp(i * f * position)``. Summed
over heads, ``z' * conj(z)`` has that phase, so that frequencies ``f`` follow from recorded keys alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

STRETCHES = (4, 16, 64, 256, 1 << 30)
"""Positions over which a frequency is fitted, each after the shorter one, so that no turn is miscounted."""
POWER_LAW = 1e-3
"""Largest relative error of frequencies that are called powers of a base."""


@dataclass(frozen=True)
class Rotation:
    """The first ``dims`` elements of a head are turned by ``frequencies`` ``[dims / 2]`` and multiplied."""

    dims: int
    frequencies: torch.Tensor
    interleaved: bool = False
    magnitude: float = 1.0

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``x`` ``[tokens, heads, head_dim]`` rotated at ``positions`` ``[tokens]``.

        Angles are in float32, as in engines, but for a truth in float64 turned by what was measured of it.
        """
        if not self.dims:
            return x
        exact = x.dtype == self.frequencies.dtype == torch.float64
        kind = torch.float64 if exact else torch.float32
        angle = positions.to(kind)[:, None] * self.frequencies.to(kind)
        turned = as_pairs(x, self.dims, interleaved=self.interleaved)
        factor = torch.polar(torch.full_like(angle, self.magnitude), angle).to(turned.dtype)
        return from_pairs(turned * factor[:, None], x, interleaved=self.interleaved)


def as_pairs(x: torch.Tensor, dims: int, *, interleaved: bool) -> torch.Tensor:
    """The first ``dims`` elements of each head as complex numbers, ``[tokens, heads, dims / 2]``."""
    part = x[..., :dims]
    if interleaved:
        return torch.complex(part[..., ::2].contiguous(), part[..., 1::2].contiguous())
    return torch.complex(*(h.contiguous() for h in part.chunk(2, dim=-1)))


def from_pairs(pairs: torch.Tensor, x: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Inverse of ``as_pairs``; what was no pair is that of ``x``."""
    parts = (pairs.real, pairs.imag)
    whole = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat((whole, x[..., whole.shape[-1] :]), dim=-1)


def measure(
    before: torch.Tensor, after: torch.Tensor, positions: torch.Tensor, *, dims: int, interleaved: bool
) -> Rotation:
    """The rotation that fits best; both ``[tokens, heads, head_dim]``."""
    z = as_pairs(before.double(), dims, interleaved=interleaved)
    turned = as_pairs(after.double(), dims, interleaved=interleaved)
    length = int(positions.max()) + 1
    sums = torch.zeros(length, dims // 2, dtype=torch.complex128)
    sums.index_add_(0, positions, (turned * z.conj()).sum(1))
    magnitude = float(sums.abs().sum() / z.abs().pow(2).sum().clamp_min(1e-300))
    return Rotation(dims, _frequencies(sums), interleaved, magnitude)


def _frequencies(sums: torch.Tensor) -> torch.Tensor:
    """Turn per position of each pair, ``[pairs]``, from ``[positions, pairs]``."""
    place = torch.arange(len(sums), dtype=torch.float64)[:, None]
    steps = sums[1:] * sums[:-1].conj()
    found = steps.sum(0).angle() if len(sums) > 1 else torch.zeros(sums.shape[1], dtype=torch.float64)
    for stretch in STRETCHES:
        z, p = sums[:stretch], place[:stretch]
        phase = (z * torch.polar(torch.ones_like(p * found), -p * found)).angle()
        weight = z.abs() * p
        found = found + (weight * phase).sum(0) / (weight * p).sum(0).clamp_min(1e-300)
    return found


def powers(theta: float, dims: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Plain frequencies of a base, ``theta ** (-2 i / dims)``, in float32 as engines compute them."""
    return 1.0 / (theta ** (torch.arange(0, dims, 2, dtype=dtype) / dims))


def base_of(frequencies: torch.Tensor, dims: int) -> float | None:
    """The base whose powers the frequencies are; None where they are not."""
    if dims < 4:
        return None
    exponents = torch.arange(0, dims, 2, dtype=torch.float64) / dims
    logs = frequencies.double().clamp_min(1e-30).log()
    slope = float((exponents * logs).sum() / exponents.pow(2).sum())
    theta = math.exp(-slope)
    error = (powers(theta, dims).double() - frequencies.double()).abs() / frequencies.double().abs().clamp_min(1e-30)
    return theta if float(error[: max(2, dims // 4)].max()) < POWER_LAW else None


def bases_in(config: Mapping[str, Any]) -> list[float]:
    """Every rotary base that a config names, in any spelling and for any kind of layer."""
    return list(dict.fromkeys(_bases(config)))


def _bases(config: Mapping[str, Any]) -> Iterable[float]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _bases(value)
        elif isinstance(value, int | float) and ("theta" in name or "base_freq" in name or name == "rotary_emb_base"):
            yield float(value)
