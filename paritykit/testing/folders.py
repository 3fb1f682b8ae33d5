"""Folders of checkpoints that appear whole or not at all, also when several processes ask for one at once."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from paritykit.errors import UsageError


def empty_folder(path: Path) -> Path:
    """``path``, where nothing is yet. Raises UsageError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not an empty folder: name another one, or remove it first")
    return path


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint lies there."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def publish(target: Path, build: Callable[[Path], None]) -> None:
    """Build beside ``target`` and rename; where another process was first, its folder (the same bytes) stays."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    try:
        partial.mkdir(parents=True)
        build(partial)
        _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, target: Path) -> None:
    try:
        partial.replace(target)
    except OSError:
        if is_complete(target):
            return
        target.replace(partial.with_suffix(".damaged"))
        shutil.rmtree(partial.with_suffix(".damaged"))
        partial.replace(target)
