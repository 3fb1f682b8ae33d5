"""Reading safetensors headers: our verdict on a damaged one is the library's, and never an exception."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from paritykit.audit.header import WeightFile, read_header
from paritykit.audit.scan import read_chunks, scan_file

LAYOUTS = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda n: n != "__metadata__" and n.isprintable()),
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.uint8]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    ),
    max_size=6,
)
IN_ONE_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def write(path: Path, header: Any, *, data: bytes = b"", length: int | None = None) -> WeightFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return read_header(path, path.name)


def accepted(path: Path) -> dict[str, list[int]] | None:
    """Names and shapes as the library reads them; None if it refuses."""
    try:
        with safe_open(path, framework="np") as file:
            return {n: list(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


@IN_ONE_FOLDER
@given(LAYOUTS)
def test_any_layout_is_read_as_it_was_written(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors))
    file = read_header(path, path.name)
    assert (file.trouble, file.reason, file.size) == ("", "", path.stat().st_size)
    assert {n: t.shape for n, t in file.tensors.items()} == {n: a.shape for n, a in tensors.items()}
    for name, array in tensors.items():
        assert b"".join(c.tobytes() for c in read_chunks(path, file, name)) == array.tobytes()
    assert {n for n, _ in scan_file(path, file)} == set(tensors)


@IN_ONE_FOLDER
@given(LAYOUTS, st.data())
def test_one_damaged_byte_is_judged_as_the_library_judges_it(
    tmp_path: Path, tensors: dict[str, Any], data: st.DataObject
) -> None:
    path = tmp_path / "x.safetensors"
    whole = bytearray(save(tensors))
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    place = data.draw(st.integers(0, end - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    file = read_header(path, path.name)
    known = accepted(path)
    assert (file.trouble != "") == (known is None), (file, known)
    if known is not None:
        assert {n: list(t.shape) for n, t in file.tensors.items()} == known


@IN_ONE_FOLDER
@given(LAYOUTS, st.data())
def test_a_cut_file_is_found_and_its_loss_told(tmp_path: Path, tensors: dict[str, Any], data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    whole = save(tensors)
    kept = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:kept])
    file = read_header(path, path.name)
    assert file.trouble == ("truncated-file" if kept else "empty-file")
    assert kept == 0 or f"{kept} bytes long" in file.reason


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(("header", "data", "trouble", "said"), [
    ({"a": entry("F32", [2], 0, 8)}, b"x" * 9, "damaged-header", "not fully covered"),
    ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"x" * 12, "damaged-header", "invalid offset"),
    ({"a": entry("F32", [2], 4, 12)}, b"x" * 12, "damaged-header", "invalid offset"),
    ({"a": entry("F32", [3], 0, 8)}, b"x" * 8, "damaged-header", "invalid shape"),
    ({"a": entry("F99", [2], 0, 8)}, b"x" * 8, "damaged-header", "unknown variant"),
    ({"a": entry("F32", [-2], 0, 8)}, b"x" * 8, "damaged-header", ""),
    ({"a": entry("F32", [2], 8, 0)}, b"x" * 8, "damaged-header", ""),
    ({"a": entry("F32", [2], 0, 1 << 40)}, b"x" * 8, "truncated-file", "bytes are missing"),
    ({"a": entry("F32", [2], 0, 8)}, b"x" * 3, "truncated-file", "5 bytes are missing"),
    ({"a": 1}, b"", "damaged-header", ""),
    ([], b"", "damaged-header", ""),
    (b"\xff", b"", "damaged-header", ""),
    (b"{" * 5000, b"", "damaged-header", ""),
])  # fmt: skip
def test_a_bad_header(header: Any, data: bytes, trouble: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", header, data=data)
    assert (file.trouble, accepted(tmp_path / "x.safetensors")) == (trouble, None)
    assert said in file.reason
    assert str(tmp_path) not in file.reason


@pytest.mark.parametrize("length", [100_000_001, (1 << 64) - 1])
def test_a_length_that_cannot_be(length: int, tmp_path: Path) -> None:
    assert write(tmp_path / "x.safetensors", {}, length=length).trouble == "damaged-header"


def test_a_length_beyond_the_file(tmp_path: Path) -> None:
    assert write(tmp_path / "x.safetensors", {}, length=1000).trouble == "truncated-file"


def test_a_file_that_was_never_downloaded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4976698672\n")
    file = read_header(path, path.name)
    assert (file.trouble, file.reason) == ("lfs-pointer", "a Git LFS pointer in place of 4976698672 bytes of data")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    assert read_header(tmp_path / "x.safetensors", "x.safetensors").trouble == "damaged-header"
