"""Pickled weight files (``.bin``, ``.pt``), looked into without running them.

``torch.load(weights_only=True)`` builds nothing but tensors and plain containers, and refuses a pickle that names any
other function: that is what transformers and vLLM do too. With ``mmap`` the data stays on disk.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paritykit.audit.header import Tensor, WeightFile, pointer_reason

if TYPE_CHECKING:
    import torch


def read_pickled(path: Path, name: str) -> WeightFile:
    """The pickled file at ``path``, as far as it can be read without executing it."""
    try:
        size = path.stat().st_size
        if size == 0:
            return WeightFile(name=name, size=0, trouble="empty-file", reason="0 bytes long")
        if reason := pointer_reason(path):
            return WeightFile(name=name, size=size, trouble="lfs-pointer", reason=reason)
        if not zipfile.is_zipfile(path):
            return _no_zip(path, name, size)
        tensors = dict(_named(load_pickled(path)))
    except pickle.UnpicklingError as error:
        return WeightFile(name=name, size=size, trouble="pickle-refused", reason=_why(error))
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        return WeightFile(name=name, size=size, trouble="truncated-file", reason=_first_line(error))
    return WeightFile(name=name, size=size, tensors={n: _described(t) for n, t in tensors.items()})


def load_pickled(path: Path) -> Any:
    """What the file holds, its data memory-mapped. Raises what ``torch.load`` raises."""
    import torch

    return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)


def _no_zip(path: Path, name: str, size: int) -> WeightFile:
    """No zip archive: the old format, which cannot be mapped, or an archive that lost its end."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        return WeightFile(
            name=name, size=size, trouble="truncated-file", reason="its zip directory, at the end, is missing"
        )
    reason = "pickled in the format from before torch 1.6, which cannot be read lazily" if start[:1] == b"\x80" else ""
    if reason:
        return WeightFile(name=name, size=size, trouble="pickle-legacy", reason=reason)
    return WeightFile(name=name, size=size, trouble="damaged-header", reason="neither a zip archive nor a pickle")


def _named(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for name, value in content.items() if isinstance(content, dict) else ():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
        if plain and isinstance(name, str):
            yield name, value


def _described(tensor: torch.Tensor) -> Tensor:
    from paritykit.captures.stream import DTYPE_CODES

    code = DTYPE_CODES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return Tensor(code, tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())


def _why(error: Exception) -> str:
    """The global it asked for, where torch says which."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = next((line for line in lines if "GLOBAL" in line or "global" in line), "")
    return (named or _first_line(error))[:200]


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return (text or type(error).__name__)[:200]
