"""A safetensors file that is written while the run goes on: each tensor goes to disk from inside the hook.

The format puts a JSON header with all offsets before the data. Room for it is reserved at the front, filled with the
spaces the format allows after the JSON, and a new file is begun when the room or the size limit is used up.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
import xxhash

from paritykit.captures.manifest import DataFile

HEADER_ROOM = 1 << 18
FILE_LIMIT = 8 << 30
HEADER_LIMIT = HEADER_ROOM - 512
"""Entries stop here: what is left is for the padding after the last one."""
ALIGNMENT = 64

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order, as bytes; without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data.cast("B")


def digest_tensor(tensor: torch.Tensor, data: memoryview | None = None) -> str:
    """128-bit xxh3 digest of dtype, shape and elements in hex: against damage, at memory speed."""
    state = xxhash.xxh3_128(f"{DTYPE_CODES[tensor.dtype]} {list(tensor.shape)} ".encode())
    state.update(tensor_bytes(tensor) if data is None else data)
    return state.hexdigest()


class TensorStream:
    """Files ``<prefix>-00000.safetensors`` ... in ``folder``, one open at a time."""

    def __init__(self, folder: Path, *, prefix: str, file_limit: int = FILE_LIMIT) -> None:
        self._folder = folder
        self._prefix = prefix
        self._limit = file_limit
        self._file: IO[bytes] | None = None
        self._header: dict[str, object] = {}
        self._header_bytes = 0
        self._offset = 0
        self.files: list[DataFile] = []

    def append(self, name: str, tensor: torch.Tensor) -> tuple[int, str]:
        """Write ``tensor`` now. Returns the file's index and the digest of the bytes. Raises OSError (disk full)."""
        data = tensor_bytes(tensor)
        entry: dict[str, object] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape)}
        if self._file is None or self._header_bytes + _room(name, entry) > HEADER_LIMIT or self._offset > self._limit:
            self.close()
            self._open()
        self._write(name, entry, data)
        self._pad()
        return len(self.files), digest_tensor(tensor, data)

    def close(self) -> None:
        """Finish the open file: write its header into the room kept for it."""
        if self._file is None:
            return
        header = json.dumps(self._header, separators=(",", ":")).encode()
        room = HEADER_ROOM - 8
        self._file.seek(0)
        self._file.write(struct.pack("<Q", room) + header.ljust(room))
        self._file.close()
        name = f"{self._prefix}-{len(self.files):05d}.safetensors"
        self.files.append(DataFile(name, HEADER_ROOM + self._offset))
        self._file = None

    def abandon(self) -> None:
        """Close the file descriptor without finishing the file."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> None:
        path = self._folder / f"{self._prefix}-{len(self.files):05d}.safetensors"
        self._file = path.open("wb")
        self._file.seek(HEADER_ROOM)
        self._header, self._header_bytes, self._offset = {}, 0, 0

    def _write(self, name: str, entry: dict[str, object], data: memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        end = self._offset + len(data)
        self._header[name] = entry | {"data_offsets": [self._offset, end]}
        self._header_bytes += _room(name, entry)
        self._offset = end

    def _pad(self) -> None:
        """Keep the next tensor aligned; the format allows no gaps, so the gap is a tensor of its own."""
        gap = -self._offset % ALIGNMENT
        if gap:
            entry: dict[str, object] = {"dtype": "U8", "shape": [gap]}
            self._write(f".pad.{self._offset}", entry, memoryview(bytes(gap)))


def _room(name: str, entry: dict[str, object]) -> int:
    """Bytes of header that an entry takes at most, offsets included."""
    return len(json.dumps({name: entry})) + 64
