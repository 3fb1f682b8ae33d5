"""A checkpoint folder, copied and damaged: what a planting function of files is handed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paritykit.errors import UsageError

WEIGHTS = "model.safetensors"


class Copy:
    """A copy of a checkpoint that is one file of weights and its config."""

    def __init__(self, path: Path, *, layer: int) -> None:
        self.path, self.layer = path, layer

    def own(self, name: str) -> str:
        """A tensor's full name: ``name`` within the layer."""
        return f"model.layers.{self.layer}.{name}"

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        found: dict[str, torch.Tensor] = load_file(self.path / WEIGHTS)
        return found

    def write(self, tensors: dict[str, torch.Tensor], *, file: str = WEIGHTS) -> None:
        """Write a file of weights."""
        kept = {n: t.clone().contiguous() for n, t in tensors.items()}
        save_file(kept, self.path / file, metadata={"format": "pt"})

    def set(self, **fields: Any) -> None:
        """Change fields of config.json."""
        file = self.path / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, **fields}, indent=2), encoding="utf-8")

    @property
    def config(self) -> dict[str, Any]:
        """The config as it is."""
        found: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return found


def damaged_copy(source: Path, target: Path, plant: Callable[[Copy], None], *, layer: int) -> Path:
    """Copy ``source`` to ``target`` and let ``plant`` at it. Raises UsageError where that cannot be."""
    if target.exists():
        raise UsageError(f"{target} exists already; remove it or choose another folder")
    if not (source / WEIGHTS).is_file():
        raise UsageError(f"{source} has no {WEIGHTS}: a damaged copy is made of a checkpoint with one file of weights")
    shutil.copytree(source, target)
    try:
        plant(Copy(target, layer=layer))
    except BaseException:
        shutil.rmtree(target)
        raise
    return target
