"""A checkpoint folder as both engines see it: found, read by its headers, digested. Torch-free."""

from __future__ import annotations

import json
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from paritykit.captures.header import Entry, decode_header
from paritykit.errors import UsageError

CHUNK = 1 << 22
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""Names of dtypes in safetensors headers, and elsewhere."""
LENGTH_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""Keys for the most positions of a model: those that vLLM 0.32 derives ``max_model_len`` from."""


class Checkpoint:
    """A model folder with ``config.json``. ``Checkpoint.find`` resolves what a user writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, model: str) -> Checkpoint:
        """The checkpoint for a folder or hub id.

        Raises UsageError if there is none, it is not a checkpoint, or one of its safetensors files is damaged.
        """
        path = find_folder(model)
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is not a checkpoint: it has no config.json")
        found = cls(path)
        if not found.config.get("architectures") and not found.config.get("model_type"):
            raise UsageError(f"{path / 'config.json'} names neither a model_type nor architectures")
        if not found.weight_files:
            raise UsageError(f"{path} is not a checkpoint: it has no .safetensors or .bin weights")
        _ = found.tensors
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises UsageError if it is not a JSON object."""
        try:
            config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.path / 'config.json'} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise UsageError(f"{self.path / 'config.json'} is not a JSON object")
        return config

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary. Raises UsageError where the config has none."""
        size = self.text_config.get("vocab_size")
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"{self.path / 'config.json'} has no usable vocab_size: {size!r}")
        return size

    @property
    def max_positions(self) -> int | None:
        """Most positions the model is made for, where the config says so: the least of several."""
        return min((v for k in LENGTH_KEYS if isinstance(v := self.text_config.get(k), int) and v > 0), default=None)

    @property
    def dtype(self) -> str:
        """The dtype the config names, ``float32`` where it names none."""
        named = self.config.get("dtype") or self.config.get("torch_dtype") or self.text_config.get("dtype")
        return str(named or "float32").removeprefix("torch.")

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files, or the ``.bin`` files where there are none, sorted by name."""
        return sorted(self.path.glob("*.safetensors")) or sorted(self.path.glob("*.bin"))

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(file.stat().st_size for file in self.weight_files)

    @property
    def tensors(self) -> dict[str, list[int]]:
        """Tensor names to shapes, from the safetensors headers. Raises UsageError for a damaged file."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Tensor names to dtype names, from the safetensors headers."""
        return {name: DTYPES.get(entry.dtype, entry.dtype.lower()) for name, entry in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        files = [f for f in self.weight_files if f.suffix == ".safetensors"]
        return {name: entry for file in files for name, entry in _header(file).items()}

    @cached_property
    def digest(self) -> str:
        """128-bit xxh3 over the config and every byte of the weights: the same model has the same digest anywhere."""
        state = xxhash.xxh3_128((self.path / "config.json").read_bytes())
        for file in self.weight_files:
            state.update(file.name.encode())
            with file.open("rb", buffering=0) as stream:
                while chunk := stream.read(CHUNK):
                    state.update(chunk)
        return state.hexdigest()


def find_folder(model: str) -> Path:
    """The folder a user names, or the one a hub id is downloaded to. Raises UsageError if there is none."""
    try:
        path = Path(model).expanduser()
        there = path.exists()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"no such folder: {model} ({error})") from error
    if not there:
        path = _download(model)
    if not path.is_dir():
        raise UsageError(f"{path} is a file; give the checkpoint's folder")
    return path


def _header(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = stream.read(length) if length <= size - 8 else b""
    try:
        entries = decode_header(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not a safetensors file (or it is truncated)") from error
    end = max((e.data_offsets[1] for e in entries.values()), default=0)
    if 8 + length + end != size:
        raise UsageError(f"{file} is truncated: {size} bytes, but its header promises {8 + length + end}")
    return entries


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise UsageError(f"no such folder: {model}")
    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{model!r} is neither a folder nor a hub model that can be reached: {reason}") from error
