"""Reference captures that are kept: named by what they were made from, and never changed once they are there.

They lie under the Hugging Face cache, or in the folder that the setting ``cache`` names; ``off`` keeps none. Removing
the folder, or any folder in it, costs nothing but the time to make them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import paritykit
from paritykit.captures.manifest import SCHEMA_VERSION
from paritykit.case import Case
from paritykit.errors import CaptureFormatError, UsageError

K = TypeVar("K")
"""What is kept: a capture, or an ensemble."""
LIBRARIES = ("torch", "transformers")
SOURCES = ("engines", "captures", "comparison")
"""Folders of ParityKit whose files decide what a reference capture holds."""


class Store:
    """A folder of captures by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, key: str, make: Callable[[Path], K], *, scratch: Path, read: Callable[[Path], K]) -> K:
        """What is kept under that name, or what ``make(folder)`` gives, kept under it; ``read`` opens a folder.

        Where the store cannot be written to, ``make`` gets ``scratch``. Raises what ``make`` raises.
        """
        found = self.find(key, read)
        if found is not None:
            return found
        new = self.folder / f".{key}.{uuid.uuid4().hex[:8]}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = new.with_name(f"{new.name}.probe")  # of this call alone: others may be at it beside us
            probe.mkdir()
            probe.rmdir()
        except OSError:
            return make(scratch)
        try:
            make(new)
            return self._keep(new, key, read)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def find(self, key: str, read: Callable[[Path], K]) -> K | None:
        """What is kept under that name; what is damaged is removed."""
        path = self.folder / key
        if not path.is_dir():
            return None
        try:
            return read(path)
        except CaptureFormatError:
            shutil.rmtree(path, ignore_errors=True)
            return None

    def _keep(self, new: Path, key: str, read: Callable[[Path], K]) -> K:
        with contextlib.suppress(OSError):  # where another process was quicker
            os.rename(new, self.folder / key)
        found = self.find(key, read)
        if found is None:
            raise UsageError(f"{self.folder / key} could neither be written nor read; run with --no-cache")
        return found


def open_store(setting: str) -> Store | None:
    """The store of the setting ``cache``: ``auto``, ``off`` or a folder."""
    if setting == "off":
        return None
    if setting != "auto":
        return Store(Path(setting).expanduser())
    from huggingface_hub import cached_assets_path

    try:
        return Store(cached_assets_path("paritykit", namespace="references"))
    except OSError:
        return None


def key_of(engine: str, arguments: Mapping[str, Any], *, digest: str, cases: list[Case]) -> str:
    """The name of what an engine gives for these cases on the checkpoint with this digest: 32 hexadecimal digits."""
    parts = [
        engine,
        sorted((name, repr(value)) for name, value in arguments.items()),
        digest,
        [msgspec.to_builtins(c) for c in cases],
        SCHEMA_VERSION,
        paritykit.__version__,
        _sources(),
        [(name, _version(name)) for name in LIBRARIES],
    ]
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:32]


def joined_key(*parts: str) -> str:
    """The name of what is made from several things: 32 hexadecimal digits."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


@cache
def _sources() -> str:
    """A digest of the code that makes captures: what it made before a change is not what it makes now."""
    state, home = hashlib.sha256(), Path(paritykit.__file__).parent
    for path in sorted(p for name in SOURCES for p in (home / name).glob("*.py")):
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
