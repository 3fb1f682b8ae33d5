"""Names of weights with their numbers taken out: layers and experts of one kind have the same. Torch-free."""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?<![A-Za-z_0-9])\d{1,9}(?![A-Za-z_0-9])")


def pattern(name: str) -> str:
    """A name without its numbers: layers and experts of one kind have the same.

    >>> pattern("model.layers.3.mlp.experts.12.w1.weight")
    'model.layers.*.mlp.experts.*.w1.weight'
    """
    return NUMBER.sub("*", name)


def numbers(name: str) -> list[int]:
    """The numbers in a name.

    >>> numbers("model.layers.3.mlp.experts.12.w1.weight")
    [3, 12]
    """
    return [int(n) for n in NUMBER.findall(name)]
