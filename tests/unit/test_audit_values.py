"""What the data holds: NaN, Inf, absurd values, zeros, dtypes. The scan is held against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from paritykit.audit import audit, scan
from paritykit.audit.header import read_header
from paritykit.audit.scan import magnitude, scan_file
from paritykit.testing import tiny_model
from tests.checkpoints import codes, copied, edit_config, edit_tensors, found

UP = "model.layers.0.mlp.up_proj.weight"
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
]
IN_ONE_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(tiny_model("llama", num_hidden_layers=2), tmp_path / "m")


@IN_ONE_FOLDER
@given(st.sampled_from(DTYPES), st.binary(min_size=0, max_size=400), st.sampled_from([8, 64, scan.CHUNK]))
def test_the_scan_sees_what_torch_sees(tmp_path: Path, dtype: torch.dtype, data: bytes, chunk: int) -> None:
    kept = bytearray(data[: len(data) // dtype.itemsize * dtype.itemsize])
    tensor = torch.frombuffer(kept, dtype=dtype) if kept else torch.empty(0, dtype=dtype)
    path = tmp_path / "x.safetensors"
    save_file({"x": tensor}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        seen = dict(scan_file(path, read_header(path, path.name)))["x"]
    if not dtype.is_floating_point:
        assert (seen.largest, seen.nonfinite) == (-1, 0)
        return
    values = tensor.double()
    bad = ~values.isfinite()
    assert seen.nonfinite == int(bad.sum())
    assert seen.first == (int(bad.nonzero()[0]) if bad.any() else -1)
    code = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}.get(dtype)
    if code and kept and not bad.any():
        assert magnitude(code, seen.largest) == float(values.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(tmp_path: Path, dtype: str, value: float) -> None:
    folder = copied(tiny_model("llama", dtype=dtype, num_hidden_layers=2), tmp_path / "m")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][7, 3] = tensors[UP][100, 0] = value

    edit_tensors(folder, change)
    notice = found(folder, "nonfinite")
    assert (notice.severity, notice.place) == ("error", UP)
    assert notice.message.startswith(
        f"2 of {192 * 96} values of {UP} in model.safetensors are NaN or Inf, the first at [7, 3]"
    )


def test_masks_that_old_checkpoints_hold_are_no_fault(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda t: t.update(
            {"model.causal_mask": torch.full((4, 4), float("-inf")), "x.masked_bias": torch.tensor(-1e30)}
        ),
    )
    assert not {"nonfinite", "implausible-value"} & set(codes(audit(folder)))


def test_a_flipped_exponent_bit(folder: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP].view(torch.int32)[5, 5] ^= 1 << 30

    edit_tensors(folder, flip)
    notice = found(folder, "implausible-value")
    assert (notice.severity, notice.place) == ("warning", UP)


def test_a_matrix_that_was_never_written(folder: Path) -> None:
    edit_tensors(folder, lambda t: t[UP].zero_())
    notice = found(folder, "all-zero")
    assert (notice.severity, notice.place) == ("warning", UP)
    edit_tensors(folder, lambda t: t[UP][0, 0].fill_(1e-6))
    assert codes(audit(folder)) == []


def test_one_layer_in_another_dtype(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({UP: t[UP].bfloat16()}))
    notice = found(folder, "dtype-mixture")
    assert (notice.severity, notice.place) == ("warning", UP)
    assert "1 x F32, 1 x BF16" in notice.message or "1 x BF16, 1 x F32" in notice.message


def test_one_kind_of_tensor_in_another_dtype_is_a_note(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({n: v.bfloat16() for n, v in t.items() if v.ndim == 1}))
    assert codes(audit(folder)) == []
    assert found(folder, "dtypes").severity == "note"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_another_dtype(folder: Path, key: str) -> None:
    edit_config(folder, dtype=None, torch_dtype=None)
    assert codes(audit(folder)) == []
    edit_config(folder, **{key: "bfloat16"})
    notice = found(folder, "dtype-against-config")
    assert (notice.severity, notice.place) == ("warning", "dtype")
    assert notice.message == "config.json names bfloat16, but the weights are stored in float32"


def test_two_names_for_the_dtype(folder: Path) -> None:
    edit_config(folder, dtype="float32", torch_dtype="float32")
    assert codes(audit(folder)) == []
    edit_config(folder, torch_dtype="float16")
    notice = found(folder, "dtype-both-names")
    assert notice.hf.startswith("takes dtype: float32")
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(folder).dtype == torch.float32


def test_memory_is_bounded_by_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole: Callable[..., scan.Scan] = scan.scan_chunks

    def measured(tensor, chunks):
        def seen():
            for chunk in chunks:
                sizes.append(chunk.nbytes)
                yield chunk

        return whole(tensor, seen())

    monkeypatch.setattr(scan, "CHUNK", 1 << 12)
    monkeypatch.setattr(scan, "scan_chunks", measured)
    done = audit(tiny_model("llama"))
    assert max(sizes) == 1 << 12
    assert 0.99 * done.bytes < sum(sizes) <= done.bytes
