"""A capture that must not be read is refused, and the message says why."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paritykit.captures.manifest import MANIFEST, Segment, decode_manifest, encode_manifest
from paritykit.captures.reader import Capture
from paritykit.errors import CaptureFormatError, UnknownNameError
from tests.made import write_capture


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {"model.a": torch.randn(3, 16), "model.b": torch.randn(3, 2, 5), "model.c": torch.randn(3, 16).half()}
    target = tmp_path_factory.mktemp("whole") / "c"
    write_capture(target, [([Segment(0, 0, 3)], tensors)], facts={"head": "model.c", "n": [1, 2]})
    return target


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def data_file(folder: Path) -> Path:
    return folder / "rank0-00000.safetensors"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / MANIFEST).read_bytes())
    change(content)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(content))


def test_the_whole_one_is_read(copy: Path) -> None:
    Capture.open(copy).verify()


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(CaptureFormatError, match="no such folder"):
            Capture.open(path)


def test_a_folder_without_manifest(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(CaptureFormatError, match=r"not a complete capture: it has no manifest\.json"):
        Capture.open(copy)


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_file(copy: Path, lost: int) -> None:
    size = data_file(copy).stat().st_size
    os.truncate(data_file(copy), size - lost)
    with pytest.raises(CaptureFormatError, match=rf"rank0-00000\.safetensors is {size - lost} bytes long instead of"):
        Capture.open(copy)


def test_a_missing_file(copy: Path) -> None:
    data_file(copy).unlink()
    with pytest.raises(CaptureFormatError, match=r"rank0-00000\.safetensors is missing"):
        Capture.open(copy)


def test_a_file_that_is_no_safetensors(copy: Path) -> None:
    data_file(copy).write_bytes(bytes(data_file(copy).stat().st_size))
    with pytest.raises(CaptureFormatError, match="cannot be read"):
        Capture.open(copy).verify()


@pytest.mark.parametrize("schema", [0, 2, 99])
def test_another_schema(copy: Path, schema: int) -> None:
    edit_manifest(copy, lambda m: m.update(schema=schema, brand_new={"field": 1}))
    with pytest.raises(CaptureFormatError, match=f"capture schema {schema}; this ParityKit reads schema 1"):
        Capture.open(copy)


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dtype of the side": lambda m: m["side"].update(dtype="bfloat16"),
    "a case's tokens": lambda m: m["cases"][0]["tokens"].append(7),
    "a label": lambda m: m["steps"][0].__setitem__(0, [0, 1, 3]),
    "a point's name": lambda m: m["points"][0].update(module="model.z"),
    "swapped pieces": lambda m: m["points"][0]["pieces"][0].__setitem__(1, "model.c|0"),
    "a fact": lambda m: m["facts"].update(head="model.a"),
    "a point taken away": lambda m: m["points"].pop(),
    "an unknown field": lambda m: m.update(note="hello"),
    "an empty digest": lambda m: m.update(digest=""),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edited_manifest(copy: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(CaptureFormatError, match="the manifest was altered after it was written"):
        Capture.open(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"schema": 1}', b'{"schema": "1"}', b"\xff\xfe"])
def test_what_is_no_manifest(copy: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(CaptureFormatError, match="not a capture manifest"):
        Capture.open(copy)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_of_the_manifest(whole: Path, data: st.DataObject) -> None:
    content = bytearray((whole / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CaptureFormatError):
        decode_manifest(bytes(content), where="x")


def flip(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ mask]))


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_flipped_byte_of_the_data(whole: Path, data: st.DataObject) -> None:
    """Anywhere, also in the library's own header: refused, or not a byte of any tensor has changed."""
    clean = Capture.open(whole)
    text = data_file(whole).read_bytes().index(b"   ")
    size = data_file(whole).stat().st_size
    place = data.draw(st.integers(0, text) | st.integers(size - 400, size - 1) | st.integers(0, size - 1))
    mask = data.draw(st.integers(1, 255))
    refused = "rank0-00000.safetensors"
    flip(data_file(whole), place, mask)
    try:
        changed = Capture.open(whole)
        changed.verify()
        for key in clean:
            assert torch.equal(changed.rows(key, "a"), clean.rows(key, "a")), (key, place, mask)
            assert changed.rows(key, "a").dtype == clean.rows(key, "a").dtype
    except CaptureFormatError as error:
        refused = str(error)
    finally:
        flip(data_file(whole), place, mask)
    assert "rank0-00000.safetensors" in refused


@pytest.mark.parametrize(("old", "new"), [(b'"F32","shape":[3,16]', b'"I32","shape":[3,16]'),
                                          (b'[3,2,5]', b'[3,5,2]')])  # fmt: skip
def test_another_reading_of_the_same_bytes(copy: Path, old: bytes, new: bytes) -> None:
    content = data_file(copy).read_bytes()
    assert old in content
    data_file(copy).write_bytes(content.replace(old, new))
    with pytest.raises(CaptureFormatError, match="was altered"):
        Capture.open(copy).verify()


def test_a_manifest_survives_its_own_coding(whole: Path) -> None:
    data = (whole / MANIFEST).read_bytes()
    assert encode_manifest(decode_manifest(data, where="x")) == data


def test_names_that_are_not_there(whole: Path) -> None:
    capture = Capture.open(whole)
    with pytest.raises(UnknownNameError, match=r"unknown point 'model\.aa'; did you mean 'model\.a'"):
        capture.point("model.aa")
    with pytest.raises(UnknownNameError, match=r"unknown rank of model\.a '1'"):
        capture.point("model.a", rank=1)
