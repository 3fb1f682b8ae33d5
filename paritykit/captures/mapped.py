"""A safetensors file mapped into memory: a tensor of it is a view that costs microseconds, and bytes when it is read.

``safetensors`` itself hands out tensors of a file at a tenth of a millisecond each, and a capture has one for each
point of each decoded token. It still decides whether a file is sound.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from paritykit.captures.header import decode_header
from paritykit.captures.stream import DTYPE_CODES

DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
LENGTH = struct.Struct("<Q")
"""Bytes of the JSON header that follows, as the format begins."""


class MappedFile:
    """The tensors of the file ``path``. Raises SafetensorError or OSError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):
            data = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
        (length,) = LENGTH.unpack(data[: LENGTH.size].numpy().tobytes())
        start = LENGTH.size + length
        self._header = decode_header(data[LENGTH.size : start].numpy().tobytes())
        self._data = data[start:]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor ``name``, without a copy. Raises SafetensorError where the file has none of that name."""
        entry = self._header.get(name)
        if entry is None or entry.dtype not in DTYPES:
            raise SafetensorError(f"File does not contain tensor {name}")
        begin, end = entry.data_offsets
        return self._data[begin:end].view(DTYPES[entry.dtype]).view(entry.shape)
