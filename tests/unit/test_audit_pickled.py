"""Pickled weights: read when they are plain, refused when they are not, and never executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from paritykit.audit import audit
from paritykit.audit.pickled import read_pickled
from paritykit.testing import tiny_model
from tests.checkpoints import codes, copied, found, tensors_of


class Evil:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = copied(tiny_model("llama", num_hidden_layers=2), tmp_path / "m")
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_plain_weights_are_audited_like_others(folder: Path) -> None:
    done = audit(folder)
    assert codes(done) == []
    assert done.tensors == 21
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["model.norm.weight"][3] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    notice = found(folder, "nonfinite")
    assert (notice.place, "the first at [3]" in notice.message) == ("model.norm.weight", True)


def test_the_evil_pickle_works_elsewhere(tmp_path: Path) -> None:
    """Else the next test would prove nothing."""
    torch.save({"a": Evil(tmp_path / "owned")}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("save", [
    torch.save,
    lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
])  # fmt: skip
def test_an_evil_pickle_is_not_executed(folder: Path, tmp_path: Path, save: Any, deep: bool) -> None:
    save({"a": torch.zeros(3), "b": Evil(tmp_path / "owned")}, folder / "pytorch_model.bin")
    done = audit(folder, deep=deep)
    assert not (tmp_path / "owned").exists()
    assert {"pickle-refused", "pickle-legacy"} & set(codes(done))


def test_a_refused_pickle_is_named_with_what_it_asked_for(folder: Path, tmp_path: Path) -> None:
    torch.save({"b": Evil(tmp_path / "owned")}, folder / "pytorch_model.bin")
    notice = found(folder, "pickle-refused")
    assert (notice.severity, notice.place, notice.hf, notice.vllm) == (
        "error",
        "pytorch_model.bin",
        "fails to load it",
        "fails to load it",
    )
    assert "system" in notice.message


def test_the_old_format_is_left_alone(folder: Path) -> None:
    torch.save(
        torch.load(folder / "pytorch_model.bin"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    notice = found(folder, "pickle-legacy")
    assert (notice.severity, notice.hf) == ("warning", "reads it whole, if it is plain")


@pytest.mark.parametrize(("content", "trouble"), [
    (b"", "empty-file"),
    (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "lfs-pointer"),
    (b"\x00\x01", "damaged-header"),
    (b"PK\x03\x04rest", "truncated-file"),
])  # fmt: skip
def test_what_is_no_pickle(content: bytes, trouble: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    assert read_pickled(tmp_path / "x.bin", "x.bin").trouble == trouble


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_cut_archive(folder: Path, part: float) -> None:
    path = folder / "pytorch_model.bin"
    os.truncate(path, int(path.stat().st_size * part))
    assert found(folder, "truncated-file").place == "pytorch_model.bin"


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 3, {"a": {"b": torch.zeros(2)}}])
def test_a_pickle_that_is_no_table_of_tensors(folder: Path, content: Any) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    assert found(folder, "no-tensors").place == "pytorch_model.bin"


def test_views_and_odd_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    content = {"t": base.t(), "row": base[1], "sparse": base.to_sparse(), 3: torch.zeros(1), "none": None}
    torch.save(content, tmp_path / "x.bin")
    file = read_pickled(tmp_path / "x.bin", "x.bin")
    assert {n: t.shape for n, t in file.tensors.items()} == {"t": (4, 3), "row": (4,)}
