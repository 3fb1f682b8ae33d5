"""Checkpoint folders that are made once: under a name that says what they were made from, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from paritykit.errors import UsageError


def kept_folder(namespace: str, name: str, recipe: Any) -> Path:
    """Where in the Hugging Face assets cache a checkpoint lies that is made by ``recipe``, which is plain data."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return cached_assets_path("paritykit", namespace=namespace, subfolder=f"{name}-{digest}")


def without_folders(text: str) -> str:
    """A text in which folders of ``kept_folder`` are not named: they are this machine's.

    >>> without_folders("cannot start /home/me/assets/paritykit/drawn/bert-668d1da08f311d41: no head")
    'cannot start the model: no head'
    """
    return re.sub(r"[^\s'\"(]*/paritykit/[a-z]+/[\w.=,-]*-[0-9a-f]{16}", "the model", text)


def empty_folder(path: str | os.PathLike[str]) -> Path:
    """``path``, which is absent or an empty folder. Raises UsageError where it is neither."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: name another one, or remove it first")
    return folder


def is_complete(folder: Path) -> bool:
    """Whether there is a checkpoint already."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def publish(target: Path, build: Callable[[Path], None]) -> None:
    """Have ``build(folder)`` fill a folder beside ``target`` and rename it.

    Where another process was first, its folder (the same bytes) stays. Raises what ``build`` raises, and OSError.
    """
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


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Transformers shows no bars of its own meanwhile."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
