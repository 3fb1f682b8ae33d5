"""Ranks of nano on GPUs: several on one over gloo, one on each over NCCL. Skipped where there are too few."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paritykit.engines.nano.core import NanoLLM
from paritykit.errors import UsageError
from paritykit.testing import tiny_model
from tests.nano import Told, drive

GPUS = torch.cuda.device_count()
WORST = 1e-5
PROMPTS = [tuple((7 * n + 3 * k) % 499 for k in range(length)) for n, length in enumerate((40, 1, 13))]
PARALLEL = [
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def told(**arguments: Any) -> tuple[list[Told], NanoLLM]:
    model = tiny_model("gemma2", num_hidden_layers=2)
    with NanoLLM(model, device="cuda", max_num_batched_tokens=16, **arguments) as llm:
        return drive(llm, PROMPTS, max_tokens=6), llm


@pytest.fixture(scope="module")
def alone() -> list[Told]:
    return told()[0]


def ranks(parallel: dict[str, int]) -> int:
    return parallel.get("tensor_parallel_size", 1) * parallel.get("pipeline_parallel_size", 1)


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_ranks_that_share_a_gpu_give_what_one_gives(alone: list[Told], parallel: dict[str, int]) -> None:
    found, llm = told(**parallel, distributed_backend="gloo")
    assert max(a.error(b) for a, b in zip(alone, found, strict=True)) < WORST
    assert llm.team.worker.device == torch.device("cuda:0")


@pytest.mark.parametrize("parallel", PARALLEL, ids=str)
def test_ranks_with_a_gpu_each_talk_over_nccl(alone: list[Told], parallel: dict[str, int]) -> None:
    if ranks(parallel) > GPUS:
        pytest.skip(f"NCCL needs {ranks(parallel)} GPUs, and there are {GPUS}")
    found, llm = told(**parallel)
    assert llm.settings.distributed_backend == "nccl"
    assert max(a.error(b) for a, b in zip(alone, found, strict=True)) < WORST


def test_more_ranks_than_gpus_are_refused_over_nccl_and_share_over_gloo() -> None:
    model = tiny_model("llama", num_hidden_layers=GPUS + 1)
    with pytest.raises(UsageError, match=f"needs a GPU for each of {GPUS + 1} ranks, and there are {GPUS}"):
        NanoLLM(model, device="cuda", pipeline_parallel_size=GPUS + 1, distributed_backend="nccl")
    with NanoLLM(model, device="cuda", pipeline_parallel_size=GPUS + 1) as llm:
        assert llm.settings.distributed_backend == "gloo"
        assert len(llm.generate(PROMPTS[:1], max_tokens=2)[0]) == 2
