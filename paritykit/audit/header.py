"""A weight file by its header: its tensors, or why it cannot be read. Torch-free, and never an exception.

Whether a safetensors file is whole is decided by the safetensors library, since its verdict is what both engines get.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

import msgspec
from safetensors import SafetensorError, safe_open

from paritykit.captures.header import decode_header

Trouble = Literal[
    "", "empty-file", "lfs-pointer", "truncated-file", "damaged-header", "pickle-refused", "pickle-legacy"
]
HEADER_LIMIT = 100_000_000
POINTER = b"version https://git-lfs"


class Tensor(msgspec.Struct, frozen=True):
    """One stored tensor: its safetensors dtype code, its shape, and its bytes from ``start`` to ``end`` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return self.end - self.start


class WeightFile(msgspec.Struct, frozen=True, kw_only=True):
    """One weight file; ``trouble`` is the code of what is wrong with it and ``reason`` says it in words."""

    name: str
    size: int
    tensors: dict[str, Tensor] = {}
    trouble: Trouble = ""
    reason: str = ""


def read_header(path: Path, name: str) -> WeightFile:
    """The safetensors file at ``path``, as far as it can be read."""
    trouble: Trouble
    try:
        size = path.stat().st_size
        trouble, reason = _pretest(path, size) or ("", "")
        if not trouble:
            return WeightFile(name=name, size=size, tensors=_tensors(path))
    except OSError as error:
        return WeightFile(name=name, size=0, trouble="damaged-header", reason=error.strerror or type(error).__name__)
    except (SafetensorError, msgspec.MsgspecError, ValueError) as error:
        trouble, reason = "damaged-header", str(error).removeprefix("Error while deserializing header: ")
    return WeightFile(name=name, size=size, trouble=trouble, reason=reason)


def _pretest(path: Path, size: int) -> tuple[Trouble, str] | None:
    """The usual damages by their own names, with the numbers the library does not give; None if there are none."""
    if size == 0:
        return "empty-file", "0 bytes long"
    if reason := pointer_reason(path):
        return "lfs-pointer", reason
    return _length_reason(path, size)


def _length_reason(path: Path, size: int) -> tuple[Trouble, str] | None:
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) == 8 and length > HEADER_LIMIT:
            return "damaged-header", f"its first 8 bytes promise a header of {length} bytes, beyond the format's limit"
        if len(start) < 8 or 8 + length > size:
            return "truncated-file", f"{size} bytes long, but its header alone should end at byte {8 + length}"
        entries = decode_header(stream.read(length)).values()
    end = 8 + length + max((e.data_offsets[1] for e in entries), default=0)
    if end > size:
        return "truncated-file", f"{size} bytes long, but its header promises {end}: {end - size} bytes are missing"
    return None


def pointer_reason(path: Path) -> str:
    """Why the file is no data but a Git LFS pointer; empty if it is none."""
    with path.open("rb") as stream:
        head = stream.read(200)
    if not head.startswith(POINTER):
        return ""
    size = next((line[5:].decode(errors="replace") for line in head.splitlines() if line.startswith(b"size ")), "?")
    return f"a Git LFS pointer in place of {size} bytes of data"


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="np"):
        pass  # it has read and judged the header
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        entries = decode_header(stream.read(length))
    base = 8 + length
    return {
        n: Tensor(e.dtype, tuple(e.shape), base + e.data_offsets[0], base + e.data_offsets[1])
        for n, e in entries.items()
    }
