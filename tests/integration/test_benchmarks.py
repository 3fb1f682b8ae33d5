"""Benchmarks measure what they say: here what diagnosis costs, on one fault and on an engine without one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.explain_speed import PARTS, Bench, report
from tests.nano import one_thread


def test_what_diagnosis_costs_is_told_for_a_fault_and_nothing_for_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with one_thread():
        bench = Bench("qwen2", {}, tmp_path, dtype="float32")
        rounds = {name: [bench.measure("nano", name, time.perf_counter)] for name in ("norm-eps", "null-forward")}
    (faulty, said), (clean, nothing) = rounds["norm-eps"][0], rounds["null-forward"][0]
    assert said == "norm-eps at model.layers.1.input_layernorm"
    assert nothing == "nothing fails"
    assert list(faulty) == list(PARTS)
    assert min(faulty.values()) > 0
    assert clean["replay"] + clean["explain"] < (faulty["replay"] + faulty["explain"]) / 4
    report(rounds)
    told = capsys.readouterr().out
    assert "x start + run + compare (norm-eps)" in told
    assert "nothing fails" in told
