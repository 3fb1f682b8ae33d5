"""A checkpoint folder: what is one, what is not and why, and what it says of its model."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.dtypes import DTYPES, dtype_name, parse_dtype
from paritykit.engines.vllm.limits import KV_MINIMUM, check_parallel, default_lengths, kv_cache_bytes
from paritykit.errors import UnknownNameError, UsageError
from paritykit.testing import tiny_model


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("qwen2", num_hidden_layers=2)


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy"


def made(folder: Path, **config: Any) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    write_safetensors(folder / "model.safetensors", {})
    return Checkpoint.find(str(folder))


def write_safetensors(path: Path, header: Any, *, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_it_agrees_with_the_library(model: Path) -> None:
    found = Checkpoint.find(str(model))
    with safe_open(model / "model.safetensors", framework="pt") as file:
        assert found.tensors == {k: list(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    assert (found.vocab_size, found.max_positions, found.dtype) == (499, 512, "float32")


@pytest.mark.parametrize(("config", "said"), [
    (None, "is not a checkpoint: it has no config.json"),
    (b"{", "config.json cannot be read"),
    (b"\xff\xfe", "config.json cannot be read"),
    (b"[]", "config.json is not a JSON object"),
    (b"{}", "names neither a model_type nor architectures"),
])  # fmt: skip
def test_a_bad_config(copy: Path, config: bytes | None, said: str) -> None:
    (copy / "config.json").unlink()
    if config is not None:
        (copy / "config.json").write_bytes(config)
    with pytest.raises(UsageError, match=said):
        Checkpoint.find(str(copy))


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"it has no \.safetensors or \.bin weights"):
        Checkpoint.find(str(copy))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere/x", "a/b/c", "~nosuchuser/x", "x" * 5000])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Checkpoint.find(name)


@pytest.mark.parametrize("name", ["nobody/has-this-model", "nothing-like-it", "bad name!", "a\0b"])
def test_no_such_hub_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="neither a folder nor a hub model"):
        Checkpoint.find(name)


def test_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; give the checkpoint's folder"):
        Checkpoint.find(str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"no config\.json"):
        Checkpoint.find(str(tmp_path))


@pytest.mark.parametrize("lost", [1, 1000])
def test_truncated_weights(copy: Path, lost: int) -> None:
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - lost)
    with pytest.raises(UsageError, match="is truncated: "):
        Checkpoint.find(str(copy))


@pytest.mark.parametrize("size", [0, 5, 8, 500])
def test_weights_cut_within_the_header(copy: Path, size: int) -> None:
    os.truncate(copy / "model.safetensors", size)
    with pytest.raises(UsageError, match="is not a safetensors file"):
        Checkpoint.find(str(copy))


HEADERS: dict[str, Any] = {
    "no json": b"{{{",
    "no text": b"\xff\xfe\xfd",
    "a list": [],
    "entries of another kind": {"w": 3},
    "no offsets": {"w": {"dtype": "F32", "shape": [1]}},
    "no shape": {"w": {"dtype": "F32", "data_offsets": [0, 0]}},
    "offsets of another kind": {"w": {"dtype": "F32", "shape": [1], "data_offsets": "x"}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_weights_with_an_odd_header(copy: Path, header: Any) -> None:
    write_safetensors(copy / "model.safetensors", header)
    with pytest.raises(UsageError, match="is not a safetensors file"):
        Checkpoint.find(str(copy))


def test_a_header_length_beyond_the_file(copy: Path) -> None:
    write_safetensors(copy / "model.safetensors", {}, length=1 << 62)
    with pytest.raises(UsageError, match="is not a safetensors file"):
        Checkpoint.find(str(copy))


def test_one_damaged_shard_among_several(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "model-00002.safetensors")
    assert len(Checkpoint.find(str(copy)).weight_files) == 2
    os.truncate(copy / "model-00002.safetensors", 1000)
    with pytest.raises(UsageError, match=r"model-00002\.safetensors"):
        Checkpoint.find(str(copy))


def test_the_digest_follows_the_content_and_not_the_place(copy: Path, model: Path) -> None:
    first = Checkpoint.find(str(model)).digest
    assert Checkpoint.find(str(copy)).digest == first
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert Checkpoint.find(str(copy)).digest != first
    config = json.loads((model / "config.json").read_text())
    shutil.copy(model / "model.safetensors", copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert Checkpoint.find(str(copy)).digest != first


def test_what_the_config_says(tmp_path: Path) -> None:
    inner = made(tmp_path / "a", text_config={"vocab_size": 7, "n_positions": 9, "dtype": "bfloat16"})
    assert (inner.vocab_size, inner.max_positions, inner.dtype) == (7, 9, "bfloat16")
    plain = made(tmp_path / "b", torch_dtype="torch.float16", vocab_size=5, max_position_embeddings=-1)
    assert (plain.max_positions, plain.dtype) == (None, "float16")
    for number, size in enumerate([None, 0, "many"]):
        with pytest.raises(UsageError, match="no usable vocab_size"):
            _ = made(tmp_path / f"c{number}", vocab_size=size).vocab_size


@pytest.mark.parametrize("short", ["fp64", "fp32", "bf16", "fp16", "half", "torch.bfloat16", *DTYPES])
def test_dtypes(short: str) -> None:
    assert str(parse_dtype(short)) == f"torch.{dtype_name(short)}"


@pytest.mark.parametrize("name", ["float31", "int8", "", "torch.", "Tensor", "nn"])
def test_no_such_dtype(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype"):
        parse_dtype(name)


@pytest.mark.parametrize(("config", "size", "said"), [
    ({}, 0, "must be at least 1, not 0"),
    ({}, 3, "does not divide the model's 8 attention heads"),
    ({"num_key_value_heads": 6}, 4, "neither divides nor is a multiple of the 6 kv heads"),
    ({"intermediate_size": 30}, 4, "does not divide intermediate_size 30"),
    ({"moe_intermediate_size": 6}, 4, "does not divide moe_intermediate_size 6"),
    ({}, 1, ""), ({}, 2, ""), ({}, 8, ""),
    ({"num_key_value_heads": 2}, 8, ""), ({"num_key_value_heads": 1}, 4, ""),
    ({"intermediate_size": None}, 4, ""),
])  # fmt: skip
def test_parallel_sizes(tmp_path: Path, config: dict[str, Any], size: int, said: str) -> None:
    checkpoint = made(tmp_path / "m", **{"num_attention_heads": 8, "intermediate_size": 32, **config})
    if said:
        with pytest.raises(UsageError, match=said):
            check_parallel(checkpoint, size)
    else:
        check_parallel(checkpoint, size)


def test_sizes_that_vllm_is_told(tmp_path: Path) -> None:
    small = made(tmp_path / "s", max_position_embeddings=512, num_attention_heads=4, hidden_size=64)
    assert default_lengths(small) == 512
    assert kv_cache_bytes(small, 512) == KV_MINIMUM
    large = made(tmp_path / "l", max_position_embeddings=1 << 20, num_hidden_layers=32, num_attention_heads=32,
                 num_key_value_heads=8, hidden_size=4096)  # fmt: skip
    assert default_lengths(large) == 4096
    assert kv_cache_bytes(large, 4096) >= 4096 * 32 * 2 * 8 * 128 * 4
    assert default_lengths(made(tmp_path / "u")) == 4096
