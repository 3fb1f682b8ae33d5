"""Reading a checkpoint as a loader does, and handing one to loaders that want a folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from paritykit.engines.checkpoint import Checkpoint

Pair = tuple[str, torch.Tensor]


def checkpoint_weights(checkpoint: Checkpoint) -> Iterator[Pair]:
    """Every tensor of the safetensors files, in file order, memory-mapped."""
    for file in checkpoint.weight_files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    yield name, opened.get_tensor(name)


class TensorReader:
    """Gives single tensors of a checkpoint's safetensors files by name, None for one that is not there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = [f for f in checkpoint.weight_files if f.suffix == ".safetensors"]

    @cached_property
    def _places(self) -> dict[str, Any]:
        opened = [safe_open(file, framework="pt") for file in self._files]
        return {name: file for file in opened for name in list(file.keys())}  # type: ignore[no-untyped-call]

    def __call__(self, name: str) -> torch.Tensor | None:
        """The tensor, memory-mapped; None as well where its file cannot be read."""
        try:
            file = self._places.get(name)
            return None if file is None else file.get_tensor(name)
        except (SafetensorError, OSError):
            return None


def through_folder(checkpoint: Checkpoint, load: Callable[[Path], Any]) -> Callable[[Iterable[Pair]], None]:
    """A loader of (name, tensor) pairs made of one that takes a folder.

    The pairs are written to a temporary folder with the files, names and side files of ``checkpoint``, one file in
    memory at a time.
    """

    def loader(weights: Iterable[Pair]) -> None:
        with tempfile.TemporaryDirectory(prefix="paritykit-weights-") as name:
            folder = Path(name)
            for file in checkpoint.path.iterdir():
                if file.is_file() and file not in checkpoint.weight_files:
                    shutil.copy2(file, folder / file.name)
            pairs = iter(weights)
            for file in checkpoint.weight_files:
                with safe_open(file, framework="pt") as opened:
                    count = len(list(opened.keys()))
                part = {n: t.contiguous() for n, t in (next(pairs) for _ in range(count))}
                save_file(part, folder / file.name, metadata={"format": "pt"})
            load(folder)

    return loader
