"""A checkpoint folder as facts that the rules read: nothing is judged here, and each fact is found once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from paritykit.audit.header import Tensor, WeightFile, read_header
from paritykit.audit.loaders import Choice, Index, hf_choice, vllm_choice
from paritykit.audit.model import HFModel, read_model
from paritykit.audit.scan import Scan, scan_file
from paritykit.errors import UsageError

Progress = Callable[[str, int, int], object]
WEIGHTS = (".safetensors", ".bin", ".pt")


class Folder:
    """One checkpoint folder, and what it is audited for. Raises UsageError if it is none."""

    def __init__(
        self, path: Path, *, deep: bool = True, tensor_parallel_size: int = 1, progress: Progress | None = None
    ) -> None:
        self.path = path
        self.deep = deep
        self.tensor_parallel_size = tensor_parallel_size
        self._progress = progress
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is not a checkpoint: it has no config.json")
        if not any(n.endswith(WEIGHTS) for n in self.names) and not self.indexes:
            raise UsageError(f"{path} is not a checkpoint: it has no .safetensors, .bin or .pt weights and no index")
        _ = self.config

    @cached_property
    def names(self) -> list[str]:
        """Every file of the folder and its subfolders, relative to it."""
        try:
            return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read: {error.strerror or error}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises UsageError if it is not a JSON object."""
        try:
            config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.path / 'config.json'} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise UsageError(f"{self.path / 'config.json'} is not a JSON object")
        return config

    @cached_property
    def indexes(self) -> dict[str, Index]:
        """The index files by name."""
        names = [n for n in self.names if n.endswith(".index.json") and "/" not in n]
        return {n: _read_index(self.path / n, n) for n in names}

    @cached_property
    def files(self) -> dict[str, WeightFile]:
        """Every weight file of the folder itself, and those of subfolders that an index lists."""
        listed = {f for index in self.indexes.values() for f in index.weights.values()}
        names = [n for n in self.names if n.endswith(WEIGHTS) and ("/" not in n or n in listed)]
        return {n: self._read(n) for n in names}

    @cached_property
    def hf(self) -> Choice:
        """What transformers reads."""
        return hf_choice(self.names, self.indexes)

    @cached_property
    def vllm(self) -> Choice:
        """What vLLM reads."""
        return vllm_choice(self.names, self.indexes)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """What transformers gets, by name; where it cannot load, what vLLM gets, or all there is."""
        for choice in (self.hf, self.vllm):
            if not choice.fails:
                return self.held(choice)
        return self.held(Choice(files=self.hf.files or self.vllm.files or tuple(self.files)))

    def held(self, choice: Choice) -> dict[str, Tensor]:
        """The tensors of the files an engine reads; the last file wins."""
        found: dict[str, Tensor] = {}
        for name in choice.files:
            if name in self.files:
                found.update(self.files[name].tensors)
        return found

    def sources(self, choice: Choice) -> dict[str, str]:
        """The file that each tensor comes from."""
        return {t: f for f in choice.files if f in self.files for t in self.files[f].tensors}

    def holders(self, tensor: str) -> list[str]:
        """The files that hold a tensor of this name."""
        return [f.name for f in self.files.values() if tensor in f.tensors]

    @cached_property
    def model(self) -> HFModel:
        """What transformers makes of the config and of the tensors' names and shapes; no data is read."""
        return read_model(self.path, self.tensors)

    @cached_property
    def scans(self) -> dict[tuple[str, str], Scan]:
        """What one pass over the data shows, by file and tensor; empty unless ``deep``."""
        found: dict[tuple[str, str], Scan] = {}
        if not self.deep:
            return found
        readable = [f for f in self.files.values() if f.tensors]
        total, done = sum(f.size for f in readable), 0
        for file in readable:
            for name, scan in scan_file(self.path / file.name, file):
                found[file.name, name] = scan
                done += file.tensors[name].bytes
                if self._progress:
                    self._progress(f"audit {file.name}", done, total)
        return found

    def same(self, tensor: str, one: str, other: str) -> bool | None:
        """Whether a tensor is the same in two files; None where its data was not read."""
        if self.files[one].tensors[tensor].shape != self.files[other].tensors[tensor].shape:
            return False
        if self.files[one].tensors[tensor].dtype != self.files[other].tensors[tensor].dtype:
            return False
        first, second = self.scans.get((one, tensor)), self.scans.get((other, tensor))
        return first.digest == second.digest if first and second else None

    def read_scans(self) -> Iterator[tuple[str, str, Tensor, Scan]]:
        """File, name, tensor and scan of all that was read."""
        for (file, name), scan in self.scans.items():
            yield file, name, self.files[file].tensors[name], scan

    def _read(self, name: str) -> WeightFile:
        if name.endswith(".safetensors"):
            return read_header(self.path / name, name)
        from paritykit.audit.pickled import read_pickled

        return read_pickled(self.path / name, name)


class _IndexContent(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: Any = msgspec.UNSET


def _read_index(path: Path, name: str) -> Index:
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_IndexContent)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        return Index(name=name, trouble=f"cannot be read: {error}")
    return Index(name=name, weights=content.weight_map, has_metadata=content.metadata is not msgspec.UNSET)
