"""Real vLLM on two stages of a pipeline, on the CPU: every point of both stages, and every weight on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import paritykit as pk
from paritykit.captures.recorder import Selection
from paritykit.config import load_config
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.process import HostProcess, ProcessEngine
from paritykit.runner import compare_captures, weight_results
from paritykit.testing import tiny_model

CASES = [
    pk.Case(id="long", tokens=tuple((11 * k + 5) % 499 for k in range(45)), new_tokens=6),
    pk.Case(id="one", tokens=(498,), new_tokens=3),
]


@pytest.mark.deep
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_two_stages_are_at_parity_and_each_weight_is_on_its_stage(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    reference = pk.capture(pk.engine("hf", model, dtype="float32"), cases=CASES)
    engine = pk.engine("vllm", model, dtype="float32", pipeline_parallel_size=2)
    engine.open()
    try:
        fed = [c.force(reference.generated(c.id)) for c in CASES]
        capture = engine.run(fed, points=Selection(), out=tmp_path / "capture")
        weights = weight_results(engine.ledger(), engine.describe(), Checkpoint.find(str(model)))
    finally:
        engine.close()
    run = compare_captures(reference, capture, config=load_config({}, environ={}))
    assert run.summary.verdict == "pass", run.summary
    assert run.summary.unmatched == 0
    assert {n: capture.point(f"model.layers.{n}.mlp").rank for n in range(4)} == {0: 0, 1: 0, 2: 1, 3: 1}
    assert list(capture.points["#logits"]) == [1]
    assert weights.summary.verdict == "pass", weights.summary
    assert {(w.tensor, w.rank) for w in weights.weights if w.tensor.endswith("o_proj.weight")} == {
        (f"model.layers.{n}.self_attn.o_proj.weight", n // 2) for n in range(4)
    }
    assert capture.manifest.side.parallel == {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}


def shift_output(worker: Any) -> None:
    """What vLLM's model puts out is off by one, by an attribute of the object itself."""
    inner = worker.model_runner.model.model
    right = inner.forward
    inner.forward = lambda *args, **kwargs: right(*args, **kwargs) + 1


def test_recording_leaves_what_was_changed_in_a_model(hosts: dict[str, HostProcess], tmp_path: Path) -> None:
    model, target = str(tiny_model("qwen2")), "tests.integration.test_vllm_stages:shift_output"
    engine = ProcessEngine("vllm", model, {"dtype": "float32", "after_load": target}, host=hosts["vllm"])
    engine.open()
    try:
        first, second = (engine.run(CASES, points=Selection(["*norm"]), out=tmp_path / n) for n in ("1", "2"))
    finally:
        engine.close()
    for case in CASES:
        ours, theirs = (c.rows("model.norm", case.id) for c in (first, second))
        assert torch.equal(ours, theirs)
    assert [first.generated(c.id) for c in CASES] == [second.generated(c.id) for c in CASES]
