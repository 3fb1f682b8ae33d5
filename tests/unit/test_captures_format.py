"""The files of a capture: what goes in comes out, for us and for the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from paritykit.captures.manifest import Segment
from paritykit.captures.stream import ALIGNMENT, DTYPE_CODES, HEADER_ROOM, TensorStream
from tests.made import write_capture

DTYPES = [d for d in DTYPE_CODES if d.is_floating_point]
SHAPES = [[1, 1], [3, 5], [7], [2, 3, 1, 5], [1, 0], [4, 127], [5, 1, 1, 1, 1, 3]]


def noise(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of the dtype is likely, NaN and infinities too."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (max(1, torch.Size(shape).numel() * size),), dtype=torch.uint8)
    raw = raw[: torch.Size(shape).numel() * size]
    return (raw & 1).view(torch.bool).reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: list[int]) -> None:
    tensor = noise(shape, dtype)
    capture = write_capture(tmp_path / "c", [([Segment(0, 0, shape[0])], {"m": tensor, "n": tensor})])
    assert capture.point("m").dtype == str(dtype).removeprefix("torch.")
    assert capture.point("m").row == shape[1:]
    assert same_bits(capture.rows("m", "a"), tensor)
    capture.verify()
    piece = capture.point("n").pieces[0]
    with safe_open(tmp_path / "c" / capture.manifest.files[0].name, framework="pt") as file:
        assert same_bits(file.get_tensor(piece.name), tensor)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded", "negative", "gradient"])
def test_any_memory_layout_comes_back(tmp_path: Path, view: str) -> None:
    base = torch.randn(6, 8)
    tensor = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:, :1].expand(6, 4),
        "negative": torch.imag(torch.complex(base, base).conj()),
        "gradient": base.clone().requires_grad_(),
    }[view]
    capture = write_capture(tmp_path / "c", [([Segment(0, 0, len(tensor))], {"m": tensor})])
    assert torch.equal(capture.rows("m", "a"), tensor.detach())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, unique=True),
    st.sampled_from(DTYPES),
)
def test_any_module_name_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], dtype: torch.dtype
) -> None:
    folder = tmp_path_factory.mktemp("names")
    stream = TensorStream(folder, prefix="x")
    tensors = {name: noise([2, n % 5], dtype) for n, name in enumerate(names)}
    for name, tensor in tensors.items():
        stream.append(f"{name}|0", tensor)
    stream.close()
    loaded = load_file(folder / "x-00000.safetensors")
    assert all(same_bits(loaded[f"{name}|0"], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("letter", ["a", "é", "🙂", '"', "\\"])
def test_a_new_file_begins_when_the_header_is_full(tmp_path: Path, letter: str) -> None:
    """Names that JSON writes longer than they are must not run over the first tensor."""
    stream = TensorStream(tmp_path, prefix="x")
    homes = {}
    for number in range(1500):
        name, tensor = f"{letter * 100}{number}", torch.full((1, 1), number, dtype=torch.int32)
        homes[name] = stream.append(name, tensor)[0]
    stream.close()
    assert len(stream.files) > 1
    loaded = [load_file(tmp_path / file.name) for file in stream.files]
    assert [int(loaded[home][name]) for name, home in homes.items()] == list(range(1500))
    assert all((tmp_path / f.name).stat().st_size == f.bytes for f in stream.files)


def test_a_new_file_begins_at_the_size_limit(tmp_path: Path) -> None:
    stream = TensorStream(tmp_path, prefix="x", file_limit=1000)
    homes = [stream.append(f"t{n}", torch.full((100,), float(n)))[0] for n in range(9)]
    stream.close()
    assert homes == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    found = [load_file(tmp_path / stream.files[home].name)[f"t{n}"] for n, home in enumerate(homes)]
    assert [float(t[0]) for t in found] == [float(n) for n in range(9)]


def test_tensors_are_aligned(tmp_path: Path) -> None:
    stream = TensorStream(tmp_path, prefix="x")
    for n in range(1, 9):
        stream.append(f"t{n}", torch.zeros(n, dtype=torch.int8))
    stream.close()
    with safe_open(tmp_path / "x-00000.safetensors", framework="pt") as file:
        addresses = [file.get_tensor(f"t{n}").data_ptr() for n in range(1, 9)]
    assert all((a - addresses[0]) % ALIGNMENT == 0 for a in addresses)
    assert HEADER_ROOM % ALIGNMENT == 0


def test_a_dtype_that_cannot_be_stored_is_dropped_with_the_reason(tmp_path: Path) -> None:
    odd = torch.zeros(2, 4).to(torch.float8_e4m3fnuz)
    capture = write_capture(tmp_path / "c", [([Segment(0, 0, 2)], {"odd": odd, "m": torch.zeros(2, 4)})])
    assert list(capture) == ["m"]
    assert [(d.point, d.reason) for d in capture.manifest.dropped] == [
        ("odd", "tensors of float8_e4m3fnuz cannot be stored")
    ]
