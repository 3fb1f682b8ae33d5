"""Checkpoints on disk for the audit's tests: copied from a tiny model, then changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paritykit.audit import Audit, Notice, audit

Tensors = dict[str, torch.Tensor]


def copied(model: Path, folder: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(model, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in changes or v is not None}))


def tensors_of(folder: Path) -> Tensors:
    """All tensors, of all safetensors files."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of ``model.safetensors`` in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def sharded(folder: Path, parts: int = 3) -> Path:
    """The same checkpoint as shards with an index."""
    tensors = tensors_of(folder)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        own = names[part::parts]
        save_file({n: tensors[n].contiguous() for n in own}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str], **extra: Any) -> None:
    """``model.safetensors.index.json``; ``metadata=None`` leaves that out."""
    content = {"metadata": {}, "weight_map": weight_map, **extra}
    kept = {k: v for k, v in content.items() if v is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps(kept))


def read_index(folder: Path) -> dict[str, str]:
    """Tensor to file, as the index has it."""
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def found(folder: Path, code: str, **arguments: Any) -> Notice:
    """The one notice with this code."""
    notices = [n for n in audit(folder, **arguments).notices if n.code == code]
    assert len(notices) == 1, notices
    return notices[0]


def codes(done: Audit, *, worst: tuple[str, ...] = ("error", "warning")) -> list[str]:
    """Codes of the notices of these severities."""
    return [n.code for n in done.notices if n.severity in worst]
