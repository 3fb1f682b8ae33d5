"""Addresses as weights: what is loaded says where it came from.

Every element of the synthetic checkpoint has an address, 1 and up. Its code is a bijection of the address over
``2 ** width`` numbers, far more than there are addresses, and is loaded in several passes, one digit at a time, each
digit small enough for the narrowest dtype on the way to hold it exactly. So

- reading all digits back gives the address, for sure: the digits are exact and the bijection has an inverse;
- a value that was changed on the way (offset, scaled, summed) gives a number that is nobody's address, but for a chance
  of ``addresses / 2 ** width`` an element;
- no element is zero in every pass: zeros are padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

WIDTH = 44
"""Bits of a code: room for 2^26 addresses with a chance of 4e-6 that a changed element reads as an address."""
FACTOR = 0x9E3779B97F5
"""Odd, so that multiplying by it modulo a power of two has an inverse."""
OFFSET = 0x2545F4914F6
"""Without it, the code of twice an address would often be twice its code, and sums and halves alike."""
BITS = {
    torch.float64: 22,
    torch.float32: 22,
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
    torch.int64: 22,
    torch.int32: 22,
    torch.int16: 11,
    torch.int8: 6,
    torch.uint8: 7,
}
"""Bits of a digit, by dtype: one less than the integers it holds exactly, so that a digit plus one is exact too."""


class Coding(NamedTuple):
    """Digits of ``bits`` bits each, ``passes`` of them."""

    bits: int
    passes: int

    @property
    def width(self) -> int:
        """Bits of a whole code."""
        return self.bits * self.passes

    def digit(self, addresses: torch.Tensor, number: int) -> torch.Tensor:
        """Digit ``number`` (0: the lowest) of the codes of int64 ``addresses``, as int64 of the same shape."""
        return (self._mix(addresses) >> (self.bits * number)) & ((1 << self.bits) - 1)

    def join(self, digits: list[torch.Tensor]) -> torch.Tensor:
        """The addresses that int64 ``digits``, the lowest first, spell; -1 where one of them is no digit."""
        top = 1 << self.bits
        valid = torch.ones_like(digits[0], dtype=torch.bool)
        code = torch.zeros_like(digits[0])
        for number, digit in enumerate(digits):
            valid &= (digit >= 0) & (digit < top)
            code |= digit.clamp(0, top - 1) << (self.bits * number)
        return torch.where(valid, self._unmix(code), -1)

    def _mix(self, x: torch.Tensor) -> torch.Tensor:
        half, mask = (self.width + 1) // 2, (1 << self.width) - 1
        x = x ^ (x >> half)
        x = (x * FACTOR + OFFSET) & mask
        return x ^ (x >> half)

    def _unmix(self, x: torch.Tensor) -> torch.Tensor:
        half, mask = (self.width + 1) // 2, (1 << self.width) - 1
        x = x ^ (x >> half)
        x = ((x - OFFSET) * pow(FACTOR, -1, 1 << self.width)) & mask
        return x ^ (x >> half)


def coding_for(dtypes: set[torch.dtype]) -> Coding:
    """The coding that every one of ``dtypes`` holds exactly; a dtype that is not known counts as the narrowest."""
    bits = min((BITS.get(d, 2) for d in dtypes), default=22)
    return Coding(bits=bits, passes=-(-WIDTH // bits))
