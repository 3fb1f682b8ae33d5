"""Rounding drawn anew: each run under ``Redrawing`` computes as legitimately as the last, and rounds elsewhere.

What goes into a product of matrices was rounded when it was made. There its rounding is drawn again: each number is
moved by up to one unit roundoff before the product is taken, so that the product, its own rounding and all that
follows are drawn again too. Nothing is known of the model: products are what torch's dispatcher calls so. In half
precisions the product is taken in float32 and rounded at its end, as kernels do. In float32 a product's sums are the
largest part of its rounding, and kernels add in any order: what the longest order loses is drawn on top. So is what a
hyperbolic tangent loses that is written as exponentials: near zero, where these are near one, far more than its own
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paritykit.comparison.precision import last_place
from paritykit.comparison.tolerance import ROUNDING

GROUPED = frozenset({"_grouped_mm", "grouped_mm_fallback"})
"""Products of rows with a matrix for each group of them, as of tokens with their experts: torch's, and transformers'
own where torch's cannot be had."""
PRODUCTS = GROUPED | {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}
"""Torch's products of matrices; every other (linear, matmul, einsum, attention written out) is made of these."""
TANGENT = "tanh"
"""In ``(e - 1 / e) / (e + 1 / e)`` both numbers round by up to one roundoff of one where they are near one, which is as
much of the tangent: vLLM's attention on a CPU caps its scores so, and is 2.5 times as far off for it as with a tangent
that rounds once."""
BIASED = 4.0
"""Units in the last place, as many as vector libraries allow a function (Intel's VML in its default mode), by which it
may be off everywhere in one way: a polynomial is not right on average. What vLLM's capped scores give is 2 to 3 of them
too large or too small in each layer alike, and no error that is drawn number by number is."""
AMPLITUDE = 0.75
"""Share of the unit roundoff: rounding a number once errs by 0.58 of half its last place, which is 0.69 of the roundoff
on average, as a root mean square; a uniform number up to ``AMPLITUDE`` times the roundoff does the same."""
SUMMED = 0.69
"""Times the roundoff and the root of the sum of the squares of all partial sums: how far off a sum over all terms is,
one after the other. Each addition rounds its partial sum by 0.40 of the roundoff, as a root mean square; a uniform
number's end is the root of 3 further out. The partial sums of ``n`` terms go from nothing to the whole sum ``s`` as a
walk of random steps does whose end is known (a Brownian bridge): the squares add up to ``n * (s * s / 3 + q / 6)``
where ``q`` is the sum of the squares of all terms, taken as ``a * a * b * b / n`` for factors of lengths ``a`` and
``b``. Four projections of a trained model lose 4.2, 4.5, 6.3 and 4.5e-7 so, and 3.8, 4.6, 6.0 and 3.6e-7 by this rule;
oneDNN 3 on AVX2 and vLLM's experts on a CPU add so, MKL adds blocks and loses 2.4 to 3.4e-7."""
POOL = 1 << 22
"""Random numbers that are drawn once and used from a random place on each time: drawing them costs more than a product
does."""

KEPT = 2 << 30
"""Bytes of weights in float32 that are kept from one product to the next: all of a model of half a billion numbers."""


@dataclass(frozen=True)
class Product:
    """Two factors, what is added to their product, and what both are multiplied with.

    With ``ends``, where each group of rows ends, ``right`` holds a matrix for each of them.
    """

    left: torch.Tensor
    right: torch.Tensor
    added: torch.Tensor | None = None
    scale: float = 1
    added_scale: float = 1
    ends: torch.Tensor | None = None

    @classmethod
    def of(cls, name: str, operands: Sequence[Any], kwargs: Mapping[str, Any]) -> Product:
        """The product that an operation of torch's takes."""
        tensors = [a for a in operands if isinstance(a, torch.Tensor)]
        if name in GROUPED:
            left, right, *ends = tensors
            return cls(left, right, ends=ends[0] if ends else kwargs.get("offs"))
        *added, left, right = tensors
        return cls(left, right, added[0] if added else None, kwargs.get("alpha", 1), kwargs.get("beta", 1))

    def alone(self, found: torch.Tensor) -> torch.Tensor:
        """The product by itself, of what the operation gave; nothing where a mask was added."""
        if self.added is None:
            return found.clone()
        return torch.sub(found, self.added, alpha=self.added_scale).nan_to_num_(0.0, 0.0, 0.0)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of the squares of each row of the left factor, and of the column of the right one that it meets."""
        left, right = self.left, self.right
        rows = left.square().sum(-1, keepdim=left.ndim > 1 and right.ndim > 1)
        columns = right.square().sum(-2 if right.ndim > 1 else 0, keepdim=right.ndim > 1 and self.ends is None)
        if self.ends is None:
            return rows, columns
        group = torch.searchsorted(self.ends, torch.arange(len(left), device=left.device), right=True)
        return rows, columns[group.clamp_(max=len(right) - 1)]


class Redrawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws the rounding of products anew, the same way for the same ``seed``; rows of a batch each on their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._weights: dict[tuple[Any, ...], torch.Tensor] = {}

    def __exit__(self, *raised: Any) -> Any:
        """Let go of weights, which may be others next time."""
        self._weights.clear()
        return super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out one operation, a product on operands that were rounded anew."""
        del types
        name = func.overloadpacket.__name__
        if name == TANGENT and args[0].dtype == torch.float32:
            return self._tangent(func(*args, **(kwargs or {})))
        if name not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        dtype = next(a.dtype for a in args if isinstance(a, torch.Tensor))
        if not dtype.is_floating_point:
            return func(*args, **(kwargs or {}))
        operands = [self._operand(a) if isinstance(a, torch.Tensor) else a for a in args]
        found = func(*operands, **(kwargs or {}))
        if dtype == torch.float32 and name != "convolution":  # its sums are short
            found = self._summed(found, Product.of(name, operands, kwargs or {}))
        return found.to(dtype)

    def _tangent(self, found: torch.Tensor) -> torch.Tensor:
        """A hyperbolic tangent in float32 as exponentials may give it: each first entry's by a factor of its own."""
        unit = ROUNDING["float32"]
        first = found.new_empty(found.shape[:1] + (1,) * (found.ndim - 1))
        return found.mul_(1 + self._noise(first) * (2 * BIASED * unit)).add_(self._noise(found), alpha=unit)

    def stored_in(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """What keeping numbers in ``dtype`` may make of them: each loses up to one unit in its last place.

        So much is lost where a kernel cuts them, as vLLM's does on a CPU for caches of 8 bits; rounding to nearest
        loses up to half of it. Below the smallest normal number, as if they had been kept with a scale of one.
        """
        info = torch.finfo(dtype)

        def stored(numbers: torch.Tensor) -> torch.Tensor:
            wide = numbers.float()
            unit = last_place(wide, dtype).clamp_(min=info.smallest_normal * info.eps)
            lost = unit.mul_(self._noise(wide).abs()).minimum(wide.abs())
            return (wide - wide.sign() * lost).to(numbers.dtype)

        return stored

    def _summed(self, found: torch.Tensor, call: Product) -> torch.Tensor:
        """A product in float32 with what its sums lose in their longest order."""
        rows, columns = call.squares()
        partial = call.alone(found).square_().mul_(call.left.shape[-1] / 3)
        partial.addcmul_(rows, columns, value=call.scale**2 / 6).sqrt_()
        return found.addcmul_(self._noise(found), partial, value=SUMMED * ROUNDING["float32"])

    def _operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """An operand in float32 at least, its rounding drawn anew; weights are what they are."""
        if not tensor.is_floating_point():
            return tensor
        if is_weight(tensor):
            return tensor if tensor.dtype.itemsize >= 4 else self._widened(tensor)
        wide = tensor.to(torch.float32) if tensor.dtype.itemsize < 4 else tensor
        if not tensor.numel():
            return wide
        unit = ROUNDING.get(str(tensor.dtype).removeprefix("torch."), 0.0)
        return torch.addcmul(wide, wide, self._noise(wide), value=AMPLITUDE * unit)

    def _widened(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in float32, the same for every product it is in."""
        key = weight.data_ptr(), weight.shape, weight.stride(), weight.device
        if key not in self._weights:
            wide = weight.to(torch.float32)
            if wide.nbytes + sum(w.nbytes for w in self._weights.values()) > KEPT:
                return wide
            self._weights[key] = wide
        return self._weights[key]

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
