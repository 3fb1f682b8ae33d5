"""One pass over stored values, in chunks: digest, largest magnitude, NaN and Inf. Numpy, no torch.

Nothing is cast. With its sign bit cleared, a float's bits read as an integer are in the order of its magnitude, and
Inf and NaN come after all finite values: the largest integer of a chunk tells whether it holds any.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from paritykit.audit.header import Tensor, WeightFile

CHUNK = 1 << 22
"""Bytes held at once."""

Bits = npt.NDArray[Any]


class FloatKind(msgspec.Struct, frozen=True):
    """How a float dtype's bits are read: integer type of its size, magnitude mask, first pattern that is not finite."""

    bits: str
    mask: int
    infinite: int


FLOATS = {
    "F64": FloatKind("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": FloatKind("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": FloatKind("<u2", 0x7FFF, 0x7C00),
    "BF16": FloatKind("<u2", 0x7FFF, 0x7F80),
    "F8_E4M3": FloatKind("u1", 0x7F, 0x7F),
    "F8_E5M2": FloatKind("u1", 0x7F, 0x7C),
    "F8_E8M0": FloatKind("u1", 0xFF, 0xFF),
}


class Scan(msgspec.Struct, frozen=True, kw_only=True):
    """What a tensor's data shows. ``largest`` is the bit pattern of the largest magnitude, -1 for what is no float."""

    digest: str
    largest: int = -1
    nonfinite: int = 0
    first: int = -1


def scan_file(path: Path, file: WeightFile) -> Iterator[tuple[str, Scan]]:
    """Every tensor of a file, in the order of its data."""
    for name, tensor, chunks in chunked(path, file):
        yield name, scan_chunks(tensor, chunks)


def scan_chunks(tensor: Tensor, chunks: Iterator[Bits]) -> Scan:
    """One tensor, from its bytes in order."""
    state = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    kind = FLOATS.get(tensor.dtype)
    largest, bad, first, seen = -1, 0, -1, 0
    for chunk in chunks:
        state.update(chunk.data)
        if kind is None:
            continue
        bits = chunk.view(kind.bits) & np.dtype(kind.bits).type(kind.mask)
        top = int(bits.max()) if bits.size else -1
        if top >= kind.infinite:
            places = np.flatnonzero(bits >= kind.infinite)
            first = seen + int(places[0]) if first < 0 else first
            bad += places.size
        largest, seen = max(largest, top), seen + bits.size
    return Scan(digest=state.hexdigest(), largest=largest, nonfinite=bad, first=first)


def chunked(path: Path, file: WeightFile) -> Iterator[tuple[str, Tensor, Iterator[Bits]]]:
    """Every tensor of a file, in the order of its data, with its bytes in chunks.

    A chunk is good until the next one is asked for.
    """
    names = sorted(file.tensors, key=lambda n: file.tensors[n].start)
    if file.name.endswith(".safetensors"):
        buffer = bytearray(CHUNK)
        with path.open("rb", buffering=0) as stream:
            yield from ((n, file.tensors[n], _of_stream(stream, file.tensors[n], buffer)) for n in names)
    else:
        from paritykit.audit.pickled import load_pickled

        content = load_pickled(path)
        yield from ((n, file.tensors[n], _of_torch(content[n])) for n in names)


def read_chunks(path: Path, file: WeightFile, name: str) -> Iterator[Bits]:
    """One tensor's bytes in chunks."""
    for _, _, chunks in chunked(path, msgspec.structs.replace(file, tensors={name: file.tensors[name]})):
        yield from chunks


def _of_stream(stream: Any, tensor: Tensor, buffer: bytearray) -> Iterator[Bits]:
    stream.seek(tensor.start)
    view = memoryview(buffer)
    left = tensor.bytes
    while left:
        wanted, got = min(left, len(buffer)), 0
        while got < wanted:
            read = stream.readinto(view[got:wanted])
            if not read:
                raise OSError(f"the file ended {left - got} bytes early")
            got += read
        yield np.frombuffer(view[:wanted], dtype=np.uint8)
        left -= wanted


def _of_torch(tensor: Any) -> Iterator[Bits]:
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].numpy()


def decode(tensor: Tensor, chunk: Bits) -> Bits | None:
    """A chunk's values, as float64 or float32, or None for a dtype that has no plain numpy form."""
    if tensor.dtype == "BF16":
        return (chunk.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if tensor.dtype == "F16":
        return chunk.view("<f2").astype(np.float32)
    plain = {"F64": "<f8", "F32": "<f4"}.get(tensor.dtype)
    return None if plain is None else chunk.view(plain)


def magnitude(dtype: str, bits: int) -> float:
    """The value of a magnitude's bit pattern, for the dtypes that ``decode`` knows; 0 for others."""
    kind = FLOATS.get(dtype)
    if kind is None or bits < 0:
        return 0.0
    values = decode(Tensor(dtype, (1,)), np.array([bits], dtype=kind.bits).view(np.uint8))
    return 0.0 if values is None else float(values[0])


def read_values(path: Path, file: WeightFile, name: str) -> npt.NDArray[np.float64] | None:
    """All values of one small tensor, flat; None for a dtype without a plain form."""
    parts = [decode(file.tensors[name], chunk.copy()) for chunk in read_chunks(path, file, name)]
    known = [p.astype(np.float64) for p in parts if p is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None
