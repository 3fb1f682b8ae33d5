"""The same numbers from CUDA tensors as from the CPU's. Skipped, with the reason, where there is no device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import paritykit as pk
from paritykit.comparison.metrics import measure
from paritykit.testing import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_metrics_agree_with_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 257, generator=generator)
    candidate = (reference + 1e-3 * torch.randn(300, 257, generator=generator)).to(dtype)
    here, there = measure(reference, candidate), measure(reference.cuda(), candidate.cuda())
    for name, value in here.as_dict().items():
        assert there.as_dict()[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert list(there.row_rel_l2) == pytest.approx(list(here.row_rel_l2), rel=1e-5)


def test_a_model_on_the_gpu_is_at_parity_with_the_cpu(tmp_path: Path) -> None:
    model = str(tiny_model("qwen2"))
    reference = pk.capture(pk.engine("hf", model, isolated=False), cases=pk.cases("smoke"))
    engine = pk.engine("hf", model, device="cuda", isolated=False)
    run = pk.compare(reference=reference, candidate=pk.capture(engine, cases=pk.cases("smoke"), follow=reference))
    assert run.summary.verdict == "pass", run.summary
