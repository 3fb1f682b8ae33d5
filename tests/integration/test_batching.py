"""Rows are found by (case, position), however vLLM schedules: chunks, mixed steps, small blocks, several batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.runner import compare_captures
from paritykit.testing import tiny_model
from tests.integration.conftest import Bench

CONDITIONS: dict[str, dict[str, Any]] = {
    "chunked prefill": {"max_num_batched_tokens": 32, "max_num_seqs": 4},
    "small blocks": {"block_size": 32},
    "one request at a time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_scheduling_does_not_matter(bench: Bench, condition: str) -> None:
    model = tiny_model("qwen2")
    reference = bench.reference(model)
    candidate = bench.candidate(model, reference, **CONDITIONS[condition])
    assert compare_captures(reference, candidate).summary.verdict == "pass"
    if condition == "chunked prefill":
        assert mixed_steps(candidate), "no step held a prefill chunk beside a decode row"


def mixed_steps(capture: Capture) -> list[Any]:
    prompts = [len(c.tokens) for c in capture.cases.values()]
    return [
        step
        for step in capture.manifest.steps
        if any(s.start >= prompts[s.case] for s in step) and any(s.start < prompts[s.case] for s in step)
    ]


def test_batches_and_duplicates(bench: Bench) -> None:
    model = tiny_model("qwen2")
    tokens = tuple(range(20))
    todo = [
        Case(id="a", tokens=tokens, new_tokens=4),
        Case(id="same", tokens=tokens, new_tokens=4),
        Case(id="later", tokens=tokens[:3], new_tokens=2, batch=1),
        Case(id="prompt only", tokens=(498,), batch=2),
    ]
    reference = bench.run("hf", model, todo, {"dtype": "float32"})
    candidate = bench.candidate(model, reference)
    results = compare_captures(reference, candidate)
    assert results.summary.verdict == "pass"
    assert {f.case: f.positions for f in results.findings if f.point == "model.norm"} == {
        "a": (0, 22),
        "same": (0, 22),
        "later": (0, 3),
        "prompt only": (0, 0),
    }


def test_left_alone_it_chooses_the_same_tokens(bench: Bench) -> None:
    model = tiny_model("qwen2")
    reference = bench.reference(model)
    free = bench.candidate(model, reference, follow=False)
    assert {c: free.generated(c) for c in free.cases} == {c: reference.generated(c) for c in reference.cases}


def test_forced_tokens_are_fed_and_own_choices_kept(bench: Bench, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    todo = [Case(id="a", tokens=(1, 2, 3), new_tokens=4, forced=(7, 8, 9, 10))]
    reference = bench.run("hf", model, todo, {"dtype": "float32"})
    candidate = bench.run("vllm", model, todo, {"dtype": "float32"})
    assert reference.generated("a") == candidate.generated("a") != [7, 8, 9, 10]
    assert compare_captures(reference, candidate).summary.verdict == "pass"
