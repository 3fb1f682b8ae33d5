"""Rounding drawn anew: each run under ``Redrawing`` computes as legitimately as the last, and rounds elsewhere.

What goes into a product of matrices was rounded when it was made. There its rounding is drawn again: each number is
moved by up to one unit roundoff before the product is taken, so that the product, its own rounding and all that
follows are drawn again too. Nothing is known of the model: products are what torch's dispatcher calls so. In half
precisions the product is taken in float32 and rounded at its end, as kernels do. In float32 a product's sums are the
largest part of its rounding, and kernels add in any order: what the longest order loses is drawn on top.
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
SUMMED = 0.49
"""Times the roundoff and the lengths of both factors: what one sum over all terms, one after the other, loses. Each
addition rounds its partial sum by 0.40 of the roundoff, as a root mean square; of ``n`` terms of one size these are
``0.40 * sqrt(n / 2)`` roundoffs of the root of the sum of their squares, which lengths ``a`` and ``b`` make
``a * b / sqrt(n)``; a uniform number's end is the root of 3 further out. Of 576 terms: 4.0e-7 by this rule, 4.3e-7 in
oneDNN 3 on AVX2 (which adds so), 2.5e-7 in MKL (which adds blocks)."""
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
        operands = [self._operand(a) if isinstance(a, torch.Tensor) else a for a in args]
        found = func(*operands, **(kwargs or {}))
        if dtype == torch.float32 and func.overloadpacket.__name__ != "convolution":  # its sums are short
            left, right = [a for a in operands if isinstance(a, torch.Tensor)][-2:]
            found = self._summed(found, left, right, alpha=(kwargs or {}).get("alpha", 1))
        return found.to(dtype)

    def _summed(self, found: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, alpha: float) -> torch.Tensor:
        """A product in float32 with what its sums lose in their longest order."""
        rows = left.square().sum(-1, keepdim=left.ndim > 1 and right.ndim > 1).sqrt_()
        columns = right.square().sum(-2 if right.ndim > 1 else 0, keepdim=right.ndim > 1).sqrt_()
        size = SUMMED * ROUNDING["float32"] * abs(alpha)
        return found.addcmul_(self._noise(found).mul(rows), columns, value=size)

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
