"""Rounding drawn anew: each run under ``Redrawing`` computes as legitimately as the last, and rounds elsewhere.

What goes into a product of matrices was rounded when it was made. There its rounding is drawn again: each number is
moved by up to one unit roundoff before the product is taken, so that the product, its own rounding and all that
follows are drawn again too. Nothing is known of the model: products are what torch's dispatcher calls so. In half
precisions the product is taken in float32 and rounded at its end, as kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paritykit.comparison.tolerance import ROUNDING

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"})
"""Torch's products of matrices; every other (linear, matmul, einsum, attention written out) is made of these."""
AMPLITUDE = 0.75
"""Share of the unit roundoff: rounding a number once errs by 0.58 of half its last place, which is 0.69 of the roundoff
on average, as a root mean square; a uniform number up to ``AMPLITUDE`` times the roundoff does the same."""
POOL = 1 << 22
"""Random numbers that are drawn once and used from a random place on each time: drawing them costs more than a product
does."""


class Redrawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws the rounding of products anew, the same way for the same ``seed``; rows of a batch each on their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out one operation, a product on operands that were rounded anew."""
        del types
        if func.overloadpacket.__name__ not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
        if not dtype.is_floating_point:
            return func(*args, **(kwargs or {}))
        found = func(*(self._operand(a) if isinstance(a, torch.Tensor) else a for a in args), **(kwargs or {}))
        return found.to(dtype)

    def _operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """An operand in float32 at least, its rounding drawn anew; weights are what they are."""
        wide = tensor.to(torch.float32) if tensor.dtype.itemsize < 4 else tensor
        if is_weight(tensor) or not tensor.numel():
            return wide
        unit = ROUNDING.get(str(tensor.dtype).removeprefix("torch."), 0.0)
        return torch.addcmul(wide, wide, self._noise(wide), value=AMPLITUDE * unit)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        """Numbers from -1 to 1, of the shape and dtype of ``like``."""
        count, key = like.numel(), (like.dtype, like.device)
        pool = self._pools.get(key)
        if pool is None or len(pool) < 2 * count:
            size = max(POOL, 2 * count)
            pool = torch.empty(size, dtype=torch.float32).uniform_(-1, 1, generator=self._generator)
            pool = self._pools[key] = pool.to(like.device, like.dtype)
        start = int(torch.randint(len(pool) - count + 1, (), generator=self._generator))
        return pool[start : start + count].view(like.shape)


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter, or part of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
