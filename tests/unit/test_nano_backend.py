"""Which attention backend runs, what is said where Triton cannot, and that its kernel compiles for GPUs not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from paritykit.engines.nano.attention import Scores, choose_attention
from paritykit.engines.nano.core import NanoLLM
from paritykit.engines.nano.triton_attention import cache_arguments, kernel_constants, power_of_two
from paritykit.errors import UnknownNameError, UsageError
from paritykit.testing import tiny_model
from tests.attention import FP8, HAVE_TRITON, Batch

KERNEL = "paritykit.engines.nano.triton_kernel"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}
SMALL_GPU = 99 * 1024
"""Bytes of shared memory that a program may have on GPUs of capability 8.6, 8.9 and 12.0."""
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch saw a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)


@needs_triton
@pytest.mark.usefixtures("gpu")
def test_auto_is_triton_on_a_gpu() -> None:
    assert choose_attention("auto", device="cuda", dtype="bfloat16") == "triton"
    assert choose_attention("auto", device="cuda:1", dtype="float32") == "triton"
    assert choose_attention("triton", device="cuda", dtype="float16") == "triton"
    assert choose_attention("torch", device="cuda", dtype="float16") == "torch"
    assert choose_attention("auto", device="cuda", dtype="float64") == "torch"


@pytest.mark.usefixtures("gpu", "no_triton")
def test_auto_is_torch_where_triton_is_missing() -> None:
    assert choose_attention("auto", device="cuda", dtype="bfloat16") == "torch"
    with pytest.raises(UsageError, match=r"needs the package triton.*pip install 'paritykit\[triton\]'"):
        choose_attention("triton", device="cuda", dtype="bfloat16")


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_torch_on_a_cpu() -> None:
    assert choose_attention("auto", device="cpu", dtype="float32") == "torch"
    assert choose_attention("auto", device="cuda", dtype="float32") == "torch"


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "float32", r"needs device='cuda', not 'cpu'.*TRITON_INTERPRET=1"),
        ("cuda", "float32", "needs a CUDA device, and torch sees none here"),
        ("cuda", "float64", r"not in float64: use attention_backend='torch'"),
    ],
)
@pytest.mark.usefixtures("no_gpu")
def test_triton_says_what_it_needs(device: str, dtype: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        choose_attention("triton", device=device, dtype=dtype)
    assert raised.value.exit_code == 2


def test_an_unknown_backend() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'triton'\? \(have: auto, torch, triton\)"):
        choose_attention("tritn", device="cpu", dtype="float32")


@needs_triton
def test_it_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    save_file({"no_weight_of_it": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="attention_backend 'triton' needs device='cuda'"):
        NanoLLM(tmp_path, attention_backend="triton")


def test_a_model_on_the_cpu_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from paritykit.engines.nano.core import NanoLLM\n"
        f"with NanoLLM({str(tiny_model('qwen2'))!r}) as llm:\n"
        "    print(llm.settings.attention_backend, llm.generate([[1, 2]], max_tokens=1))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("torch [["), done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "batch",
    [
        Batch(spans=((0, 40),), heads=8, head_dim=128, dtype=torch.bfloat16, kv_dtype=torch.bfloat16),
        Batch(spans=((0, 40),), heads=8, head_dim=256, dtype=torch.bfloat16, kv_dtype=torch.bfloat16),
        Batch(spans=((0, 40),), heads=6, head_dim=24, block_size=3, dtype=torch.float16, kv_dtype=FP8,
              scores=Scores(0.1, 7, 50.0)),
        Batch(spans=((0, 40),), heads=8, head_dim=128, scores=Scores(0.1, 7, 50.0)),
        Batch(spans=((0, 1),), heads=8, head_dim=256),
    ],
    ids=["bfloat16", "bfloat16-256", "float16-fp8", "float32", "float32-256"],
)  # fmt: skip
def test_the_kernel_compiles_for_gpus(
    batch: Batch, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's compiler needs no GPU; the interpreter takes much that it does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(batch, capability)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SMALL_GPU
    assert "tf32" not in compiled.asm["ptx"]


def compile_for(batch: Batch, capability: int) -> Any:
    """The kernel as a GPU of this ``capability`` would run it for ``batch``."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from paritykit.engines.nano.triton_kernel import attend_tile

    query, cache, tile_heads = batch.query(), batch.cache(), power_of_two(batch.heads // batch.kv_heads)
    rows = 16 if batch.spans == ((0, 1),) else 32 if batch.dtype == torch.float32 else 64
    constants = kernel_constants(query, cache, batch.scores, tile_heads=tile_heads, tile_tokens=rows // tile_heads)
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants["wide"] = False
    pointers = (POINTERS[t.dtype] for t in (query, query, *cache_arguments(cache)))
    kinds = [*pointers, "*i32", "*i32", "fp32", *("constexpr" for _ in constants)]
    signature = dict(zip(attend_tile.arg_names, kinds, strict=True))
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(kinds) if kind.startswith("*")}
    source = ASTSource(attend_tile, signature, constants, aligned)
    return compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
