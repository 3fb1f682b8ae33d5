"""Names of dtypes, as users write them. Torch is imported only to give a torch dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paritykit.errors import UnknownNameError

if TYPE_CHECKING:
    import torch

DTYPES = ("float64", "float32", "bfloat16", "float16")
SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def dtype_name(name: str) -> str:
    """The full name of ``fp32``, ``torch.float32``, ``bfloat16`` ...; UnknownNameError otherwise.

    >>> dtype_name("bf16")
    'bfloat16'
    """
    plain = name.removeprefix("torch.")
    plain = SHORT.get(plain, plain)
    if plain not in DTYPES:
        raise UnknownNameError("dtype", name, (*DTYPES, "auto"))
    return plain


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name; UnknownNameError if there is none."""
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name(name))
    return dtype
