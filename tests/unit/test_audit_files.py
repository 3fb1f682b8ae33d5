"""Faults of files and indexes, made on disk: each is found, named, and laid at the right place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paritykit.audit import audit
from paritykit.testing import tiny_model
from tests.checkpoints import codes, copied, found, read_index, sharded, tensors_of, write_index

FIRST = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(copied(tiny_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("shards") / "m"))


@pytest.fixture
def split(shards: Path, tmp_path: Path) -> Path:
    return copied(shards, tmp_path / "m")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return copied(tiny_model("llama", num_hidden_layers=2), tmp_path / "m")


def test_the_unchanged_one_is_clean(split: Path) -> None:
    assert codes(audit(split)) == []


@pytest.mark.parametrize(("damage", "code", "said"), [
    (lambda p: os.truncate(p, p.stat().st_size - 5), "truncated-file", "5 bytes are missing"),
    (lambda p: os.truncate(p, 3), "truncated-file", "3 bytes long"),
    (lambda p: p.write_bytes(b""), "empty-file", "0 bytes"),
    (lambda p: p.write_bytes(bytes(500)), "damaged-header", ""),
    (lambda p: p.write_bytes(p.read_bytes() + b"x"), "damaged-header", "not fully covered"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b'"F32"', b'"X32"', 1)), "damaged-header", "unknown variant"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\nsize 77\n"), "lfs-pointer", "77 bytes"),
])  # fmt: skip
def test_a_damaged_file(split: Path, damage: Callable[[Path], object], code: str, said: str) -> None:
    damage(split / FIRST)
    notice = found(split, code)
    assert (notice.severity, notice.place) == ("error", FIRST)
    assert said in notice.message
    assert (notice.hf, notice.vllm) == ("fails to load it", "fails to load it")


def test_a_damaged_file_that_nobody_reads(split: Path) -> None:
    (split / "old.safetensors").write_bytes(b"")
    notice = found(split, "empty-file")
    assert (notice.severity, notice.hf, notice.vllm) == ("warning", "does not read it", "does not read it")


def test_a_shard_that_is_gone(split: Path) -> None:
    (split / FIRST).unlink()
    notice = found(split, "index-without-file")
    assert (notice.severity, notice.place) == ("error", FIRST)
    assert "is not there" in notice.message


def test_a_shard_in_a_subfolder(split: Path) -> None:
    (split / "sub").mkdir()
    (split / FIRST).rename(split / "sub" / FIRST)
    write_index(split, {k: f"sub/{v}" if v == FIRST else v for k, v in read_index(split).items()})
    notice = found(split, "index-names-subfolder")
    assert (notice.severity, notice.place, notice.hf) == ("error", f"sub/{FIRST}", "reads it")
    assert notice.vllm.startswith("fails")


def test_a_file_that_is_not_listed(split: Path) -> None:
    save_file({"other": torch.zeros(3)}, split / "extra.safetensors")
    notice = found(split, "file-not-in-index")
    assert (notice.severity, notice.place, notice.hf, notice.vllm) == (
        "warning",
        "extra.safetensors",
        "skips it",
        "skips it",
    )
    assert "1 of them in no file that is read" in notice.message


def test_a_listed_key_that_no_file_holds(split: Path) -> None:
    index = read_index(split)
    tensors = {n: t for n, t in tensors_of(split).items() if index[n] == index[HEAD] and n != HEAD}
    save_file(tensors, split / index[HEAD], {"format": "pt"})
    notice = found(split, "index-without-key")
    assert (notice.severity, notice.place) == ("error", HEAD)
    assert found(split, "tie-mismatch").severity == "error"


def test_a_listed_key_in_another_file(split: Path) -> None:
    index = read_index(split)
    write_index(split, {**index, HEAD: next(f for f in index.values() if f != index[HEAD])})
    notice = found(split, "index-without-key")
    assert (notice.severity, notice.place, notice.vllm) == ("warning", HEAD, "finds it in another file")
    assert codes(audit(split), worst=("error",)) == []


def test_a_key_that_the_index_leaves_out(split: Path) -> None:
    write_index(split, {k: v for k, v in read_index(split).items() if k != HEAD})
    notice = found(split, "key-not-in-index")
    assert (notice.severity, notice.place) == ("warning", HEAD)
    assert codes(audit(split), worst=("error",)) == []


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": 3}', b"\xff"])
def test_an_index_that_is_none(split: Path, content: bytes) -> None:
    (split / INDEX).write_bytes(content)
    notice = found(split, "index-unreadable")
    assert (notice.severity, notice.place, notice.hf, notice.vllm) == (
        "error",
        INDEX,
        "fails to load",
        "fails to load",
    )


def test_an_index_without_metadata(split: Path) -> None:
    write_index(split, read_index(split), metadata=None)
    notice = found(split, "index-without-metadata")
    assert (notice.severity, notice.place, notice.vllm) == ("error", INDEX, "reads it without")
    with pytest.raises(KeyError, match="metadata"):
        from_pretrained(split)


def test_shards_without_index(split: Path) -> None:
    (split / INDEX).unlink()
    notice = found(split, "index-missing")
    assert (notice.severity, notice.place) == ("error", FIRST)
    assert notice.vllm == "reads " + ", ".join(sorted(p.name for p in split.glob("*.safetensors")))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        from_pretrained(split)


def test_the_same_key_in_two_listed_files(split: Path) -> None:
    index = read_index(split)
    other = "model-00000-of-00003.safetensors"
    write_index(split, {**index, "more": other})
    tensor = tensors_of(split)[HEAD]
    save_file({HEAD: tensor, "more": torch.zeros(1)}, split / other, {"format": "pt"})
    notice = found(split, "key-in-two-files")
    assert (notice.severity, notice.place) == ("warning", HEAD)
    assert f"in both {other} and {index[HEAD]}, with equal values" in notice.message
    save_file({HEAD: tensor + 1, "more": torch.zeros(1)}, split / other, {"format": "pt"})
    notice = found(split, "key-in-two-files")
    assert notice.severity == "error"
    assert "with different values" in notice.message
    assert notice.hf == notice.vllm == f"{index[HEAD]} wins: it is read last"
    assert torch.equal(from_pretrained(split).lm_head.weight, tensor)
    assert "not compared" in found(split, "key-in-two-files", deep=False).message


def test_the_two_orders_may_choose_two_winners(whole: Path) -> None:
    tensors = tensors_of(whole)
    (whole / "model.safetensors").unlink()
    files = ["model-9-of-10.safetensors", "model-10-of-10.safetensors"]
    save_file(tensors, whole / files[0], {"format": "pt"})
    save_file({HEAD: tensors[HEAD] + 1}, whole / files[1], {"format": "pt"})
    write_index(whole, {**dict.fromkeys(tensors, files[0]), HEAD: files[1]})
    notice = found(whole, "key-in-two-files")
    assert (notice.hf, notice.vllm) == (f"{files[0]} wins: it is read last", f"{files[1]} wins: it is read last")
    assert torch.equal(from_pretrained(whole).lm_head.weight, tensors[HEAD])


def test_safetensors_beside_the_single_file(whole: Path) -> None:
    tensors = tensors_of(whole)
    save_file({HEAD: tensors[HEAD] + 1}, whole / "model_v2.safetensors", {"format": "pt"})
    notice = found(whole, "stray-safetensors")
    assert (notice.severity, notice.place, notice.hf) == ("error", "model_v2.safetensors", "does not read it")
    assert notice.vllm.endswith("model_v2.safetensors")
    (whole / "model_v2.safetensors").rename(whole / "a.safetensors")
    assert found(whole, "stray-safetensors").severity == "warning"


def test_the_single_file_beside_shards(split: Path) -> None:
    tensors = tensors_of(split)
    save_file(tensors, split / "model.safetensors", {"format": "pt"})
    assert found(split, "single-beside-sharded").severity == "warning"
    save_file({**tensors, HEAD: tensors[HEAD] + 1}, split / "model.safetensors", {"format": "pt"})
    notice = found(split, "single-beside-sharded")
    assert (notice.severity, notice.place) == ("error", "model.safetensors")
    assert f"tensor {HEAD} by the same name with other values" in notice.message
    assert torch.equal(from_pretrained(split).lm_head.weight, tensors[HEAD] + 1)


def test_a_consolidated_copy(split: Path) -> None:
    tensors = tensors_of(split)
    save_file(tensors, split / "consolidated.safetensors", {"format": "pt"})
    notice = found(split, "consolidated-beside-sharded")
    assert (notice.severity, notice.place) == ("warning", "consolidated.safetensors")
    assert notice.vllm == "reads consolidated.safetensors only, with config.json"
    save_file({**tensors, HEAD: tensors[HEAD] + 1}, split / "consolidated.safetensors", {"format": "pt"})
    assert found(split, "consolidated-beside-sharded").severity == "error"
    (split / "params.json").write_text("{}")
    assert found(split, "consolidated-beside-sharded").severity == "note"


def test_a_consolidated_copy_in_a_subfolder(split: Path) -> None:
    (split / "original").mkdir()
    save_file({"x": torch.zeros(1)}, split / "original" / "consolidated.safetensors")
    notice = found(split, "consolidated-beside-sharded")
    assert (notice.severity, notice.place) == ("error", "original/consolidated.safetensors")
    assert notice.vllm.startswith("fails: consolidated*.safetensors exists in a subfolder only")


def test_pickled_weights_beside_safetensors(split: Path) -> None:
    tensors = tensors_of(split)
    torch.save(tensors, split / "pytorch_model.bin")
    notice = found(split, "bin-beside-safetensors")
    assert (notice.severity, notice.place) == ("note", "pytorch_model.bin")
    torch.save({**tensors, HEAD: tensors[HEAD] + 1}, split / "pytorch_model.bin")
    notice = found(split, "bin-beside-safetensors")
    assert notice.severity == "warning"
    assert HEAD in notice.message


def test_a_stray_bin_overwrites_the_weights(whole: Path) -> None:
    tensors = tensors_of(whole)
    (whole / "model.safetensors").unlink()
    torch.save(tensors, whole / "pytorch_model.bin")
    assert codes(audit(whole)) == []
    torch.save({n: t * 0.01 for n, t in tensors.items()}, whole / "delta-1.bin")
    notice = found(whole, "stray-bin")
    assert (notice.severity, notice.place, notice.hf) == ("error", "delta-1.bin", "does not read it")
    assert "may overwrite the right weights" in notice.vllm
    twice = found(whole, "key-in-two-files")
    assert (twice.severity, twice.vllm) == ("error", "whichever the file system lists last wins")
    shutil.move(whole / "delta-1.bin", whole / "training_args.bin")
    assert codes(audit(whole)) == []


def test_a_folder_that_only_vllm_can_load(whole: Path) -> None:
    torch.save(tensors_of(whole), whole / "weights.bin")
    (whole / "model.safetensors").unlink()
    notice = found(whole, "nothing-to-read")
    assert (notice.severity, notice.place, notice.vllm) == ("error", "weights.bin", "reads weights.bin")
    assert notice.hf.startswith("fails: there is no model.safetensors")


def test_a_file_without_tensors(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    torch.save({"epoch": 3}, whole / "pytorch_model.bin")
    assert found(whole, "no-tensors").place == "pytorch_model.bin"


def test_a_file_of_the_hub_cache_that_changed(split: Path, tmp_path: Path) -> None:
    import hashlib

    blobs = tmp_path / "blobs"
    blobs.mkdir()
    content = (split / FIRST).read_bytes()
    blob = blobs / hashlib.sha256(content).hexdigest()
    (split / FIRST).rename(blob)
    (split / FIRST).symlink_to(blob)
    assert codes(audit(split)) == []
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    notice = found(split, "digest-mismatch")
    assert (notice.severity, notice.place) == ("error", FIRST)
    assert codes(audit(split, deep=False)) == []


def test_an_audit_is_plain_data(split: Path) -> None:
    import msgspec

    (split / FIRST).write_bytes(b"")
    done = audit(split)
    assert msgspec.json.decode(msgspec.json.encode(done), type=type(done)) == done
    assert json.loads(msgspec.json.encode(done))["notices"][0]["code"] == "empty-file"


def from_pretrained(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
